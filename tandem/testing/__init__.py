"""Small fakes, each beside the interface it stands for."""
