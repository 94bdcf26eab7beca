"""The frozen LLaMA: pure nn modules that know no file, no trainer and no run config."""
