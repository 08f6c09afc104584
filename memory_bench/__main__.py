"""`python -m memory_bench`: the command."""

from memory_bench.cli import main

if __name__ == "__main__":
    main()
