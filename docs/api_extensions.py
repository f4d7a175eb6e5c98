"""What the API pages show that cannot be read from the source as it stands."""

import dataclasses
import inspect
from importlib import import_module

import griffe


class FunctionsNotModules(griffe.Extension):
    """Functions that have the name of their module, such as `sample`, are shown in place
    of it."""

    def on_package(self, *, pkg, **_):
        for name, member in list(pkg.members.items()):
            inside = member.is_alias and member.target_path.startswith(f"{pkg.name}.")
            if not inside:
                continue
            target = pkg[member.target_path.removeprefix(f"{pkg.name}.")]
            if target.is_module and name in target.members:
                path = f"{member.target_path}.{name}"
                pkg.set_member(name, griffe.Alias(name, path, parent=pkg))


class FieldsAsArguments(griffe.Extension):
    """Classes whose `__init__` is made from their fields are shown with its signature, and
    with the docstring that it is given after the class."""

    def on_package(self, *, pkg, **_):
        self._visit(pkg, pkg)

    def _visit(self, package, parent):
        for member in list(parent.members.values()):
            if member.is_alias:
                continue
            if member.is_module:
                self._visit(package, member)
            elif member.is_class and "__init__" not in member.members:
                self._add_init(package, member)

    def _add_init(self, package, cls):
        value = getattr(import_module(cls.module.path), cls.name, None)
        if not dataclasses.is_dataclass(value) or inspect.isabstract(value):
            return
        init = value.__init__
        parameters = [
            griffe.Parameter("self", kind=griffe.ParameterKind.positional_or_keyword)
        ]
        for name, parameter in list(inspect.signature(init).parameters.items())[1:]:
            default = parameter.default
            parameters.append(
                griffe.Parameter(
                    name,
                    annotation=_annotation(package, value, name),
                    kind=griffe.ParameterKind.positional_or_keyword,
                    default=None if default is parameter.empty else repr(default),
                )
            )
        function = griffe.Function("__init__", parameters=griffe.Parameters(*parameters))
        if init.__doc__ not in (None, object.__init__.__doc__):
            function.docstring = griffe.Docstring(
                inspect.cleandoc(init.__doc__), parent=function
            )
        cls.set_member("__init__", function)


def _annotation(package, cls, field):
    """The annotation of a field, where it is declared."""
    for base in cls.__mro__:
        if field in vars(base).get("__annotations__", {}):
            path = f"{base.__module__}.{base.__qualname__}".removeprefix(f"{package.name}.")
            return package[path].members[field].annotation
    return None
