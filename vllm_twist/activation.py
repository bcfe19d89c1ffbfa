"""The old name of ``_import_hook``, which distributions installed in place before 0.2.0 have as their entry point."""

from vllm_twist._import_hook import platform_plugin as platform_plugin
