"""The command line of the transformers library, with its continuous batching on the tree."""

from transformers.cli.transformers import main

from prefixtree.engines.continuous_batching import install

if __name__ == "__main__":
    install()
    main()  # type: ignore[no-untyped-call]
