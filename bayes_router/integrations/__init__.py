"""Patches for models made elsewhere.

Hugging Face models and PyTorch's own attention, their tokens routed in place.

patching.py is the door. huggingface.py (with interface.py, discovery.py, falcon.py) and
torch_attention.py each know one kind of model. call.py, experts.py, features.py and layer.py
execute a route with the model's own masks and kernels; routed.py holds what a patch adds; texts.py,
tuning.py and budget.py fit it, saving.py keeps it.
"""
