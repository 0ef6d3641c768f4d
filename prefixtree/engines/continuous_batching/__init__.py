"""The continuous batching of the transformers library on this package's tree and attention.

`install()` is the one call: from then on `model.generate_batch`, its context manager and
`transformers serve --continuous-batching` keep their KV in blocks that a prefix tree remembers,
evict them leaf by leaf, and attend to each shared prefix once.

    from prefixtree.engines import continuous_batching

    with continuous_batching.install():
        outputs = model.generate_batch(prompts, generation_config)

Nothing of the library is replaced but entries of its own registries: the allocators of full and of
sliding-window layers, the two schedulers, and one attention function more. For the server, which
is a process of its own: `python -m prefixtree.engines.continuous_batching serve MODEL
--continuous-batching ...`, with the options of `transformers`.
"""

from prefixtree.engines.continuous_batching.installation import Installation, install

__all__ = ["Installation", "install"]
