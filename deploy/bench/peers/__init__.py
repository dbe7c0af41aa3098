"""The engines that Headrace is measured against, each in its own environment and process."""
