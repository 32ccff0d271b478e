from absl.flags import FlagHolder
from ml_collections import ConfigDict

def DEFINE_config_file(name: str, *, help_string: str = ...) -> FlagHolder[ConfigDict]: ...
