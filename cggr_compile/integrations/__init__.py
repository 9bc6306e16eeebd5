"""The ways into other libraries' training loops: one file per library, which importing the package does not import."""
