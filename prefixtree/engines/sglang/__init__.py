"""SGLang on this project's cache and attention, through SGLang's own plugin openings.

Once prefixtree is installed beside SGLang, its servers know the names `--radix-cache-backend
prefixtree` and `--attention-backend prefixtree`; each works without the other. SGLang finds
`plugin.register` by the entry point `sglang.srt.plugins`; `cache` and `attention` are imported
when a server asks for them. Importing this package imports neither SGLang nor torch.
"""
