"""python -m ii_dist = ii-dist."""

from ii_dist.cli.main import run

if __name__ == "__main__":
    run()
