"""`python -m dspark_sim`."""

from dspark_sim.cli import main

if __name__ == "__main__":
    main()
