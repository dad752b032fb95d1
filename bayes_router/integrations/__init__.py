"""Patches for models made elsewhere.

Hugging Face models and PyTorch's own attention, their tokens routed in place.

`patching.py` is the door. `huggingface/` and `torch_attention.py` each know one kind of model.
`calls/` executes a route with the model's own masks and kernels; `patch/` is what is added to a
model, saved and loaded, with no library's name in it.
"""
