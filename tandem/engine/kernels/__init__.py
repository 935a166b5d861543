"""The operations of a model beside attention: one interface, one file an implementation; `cpu/` holds C++ sources."""
