"""Where fused losses meet other libraries: one file a library, imported by name and never by the package itself."""
