"""Stock Megatron specs with memory sites put in. The one room that names a model class."""
