"""Text that was read before is used again wherever it stands in a prompt.

Pure: what was found (``matches``), what is made of it (``plan``), what such blocks are called
(``names``) and how keys are turned to their new position (``rope``). Ways of moving bytes are in
``transfer``, requests in ``vllm``.
"""
