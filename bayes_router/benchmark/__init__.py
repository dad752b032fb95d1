"""What hard routing saves.

Time and memory of routed attention against the fastest full attention of a device.
"""
