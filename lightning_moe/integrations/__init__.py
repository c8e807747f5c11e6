"""The only readers of other libraries' private layouts, a file each."""
