"""`python -m sdtune`, and `accelerate launch -m sdtune`, are the command `sdtune`."""

from sdtune.cli import main

if __name__ == "__main__":
    main()
