"""The Axolotl door: the plugin class, and the schema of its YAML block."""
