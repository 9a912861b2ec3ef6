"""Axolotl support: the plugin class, the schema of its YAML blocks, and readers of Axolotl
YAMLs."""
