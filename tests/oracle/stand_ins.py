"""Stand-ins for packages that the engines import and that these tests have no use for.

vLLM and SGLang import web servers, compilers and GPU libraries before one can ask how they read a
`quantization_config`. `install` answers those imports, and only those, with modules whose every name
is a class that does nothing. What is asked of an engine must therefore not depend on them: they
compute nothing, and a test that reached one would compare nothing.
"""

import importlib.abc
import importlib.machinery
import sys
import types

import pydantic_core


class _Kind(type):
    """A class that can be subclassed, subscripted, put into a union and used as a decorator."""

    def __call__(cls, *arguments, **named):
        if len(arguments) == 1 and not named and isinstance(arguments[0], types.FunctionType):
            return arguments[0]
        return super().__call__(*arguments, **named)

    def __getattr__(cls, name):
        if name.startswith("__"):
            raise AttributeError(name)
        setattr(cls, name, stand_in(name))
        return cls.__dict__[name]

    def __getitem__(cls, _):
        return cls

    def __iter__(cls):
        return iter(())


class _Nothing:
    def __init__(self, *_, **__):
        pass

    def __init_subclass__(cls, **_):
        super().__init_subclass__()

    def __call__(self, *arguments, **_):
        # A decorator with arguments leaves its function as it is.
        return arguments[0] if arguments else self

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return stand_in(name)()

    @classmethod
    def __get_pydantic_core_schema__(cls, *_):
        return pydantic_core.core_schema.any_schema()


def stand_in(name):
    return _Kind(name, (_Nothing,), {})


class _Module(types.ModuleType):
    __path__ = ()
    __version__ = "0"

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        found = stand_in(name)
        setattr(self, name, found)
        return found


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def __init__(self, names):
        self.names = names

    def find_spec(self, name, path=None, target=None):
        if any(name == known or name.startswith(f"{known}.") for known in self.names):
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        return None

    def create_module(self, spec):
        return _Module(spec.name)

    def exec_module(self, module):
        pass


def install(names):
    """Answers imports of these packages and what is below them, if nothing else does."""
    sys.meta_path.append(_Finder(tuple(names)))
