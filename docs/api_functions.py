"""Functions that have the name of their module, such as `sample`, are shown in place of
it."""

import griffe


class FunctionsNotModules(griffe.Extension):
    def on_package(self, *, pkg, **_):
        for name, member in list(pkg.members.items()):
            inside = member.is_alias and member.target_path.startswith(f"{pkg.name}.")
            if not inside:
                continue
            target = pkg[member.target_path.removeprefix(f"{pkg.name}.")]
            if target.is_module and name in target.members:
                path = f"{member.target_path}.{name}"
                pkg.set_member(name, griffe.Alias(name, path, parent=pkg))
