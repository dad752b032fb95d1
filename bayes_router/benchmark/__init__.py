"""What hard routing saves: time and memory of routed attention against the fastest full attention of a device."""
