"""What the project costs, measured against the bare thing: loader, step, start-up. `make bench` runs all."""
