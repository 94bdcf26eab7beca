"""What the commands share: their shape, the model they load, the prompts they read, the chat."""

from moe_peft.command.shape import EXIT_CODES, FAILURE, INTERRUPTED, SUCCESS, USAGE, CommandParser, run_command

__all__ = ["EXIT_CODES", "FAILURE", "INTERRUPTED", "SUCCESS", "USAGE", "CommandParser", "run_command"]
