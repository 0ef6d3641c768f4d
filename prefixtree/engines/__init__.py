"""Engines on the cache: an embedding into the transformers library, and a small engine around it.

`prefixtree.engines.transformers.PagedModel` runs a loaded model on paged KV,
`prefixtree.engines.engine.Engine` schedules requests on it, and `prefixtree.engines.sampling` has
the parameters of a request. Importing this package alone imports neither torch nor transformers.
"""
