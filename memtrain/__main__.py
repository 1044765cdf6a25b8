"""``python -m memtrain``: the command line where its script is not on the PATH."""

from memtrain.cli import main

if __name__ == "__main__":
    main()
