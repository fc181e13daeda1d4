"""``python -m dspark_sim`` is the command ``dspark-sim``."""

from dspark_sim.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
