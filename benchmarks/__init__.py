"""What the project costs, measured against the bare thing: loader, step, start-up, models. `make bench` runs all."""
