//! Modules of one crate that import each other in a circle, which must be read together to understand any of them.
//!
//! The check reads the `use` declarations of each crate's sources, except those of tests. A parent and its child may
//! import each other: a parent re-exports what its children define. An import of a name that a module re-exports counts
//! as an import of the module that defines the name.

mod uses;

use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    fmt, fs,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result, bail};
use serde_json::Value;

use crate::publish;
use uses::{Import, Uses};

/// How many re-exports the check follows from one import.
const RE_EXPORTS_MAX: usize = 5;

/// The path of a module in its crate; the crate itself has no segments.
type Module = Vec<String>;

/// Checks every crate of the workspace.
pub(crate) fn run() -> Result<()> {
    let metadata = publish::metadata()?;
    let packages = metadata["packages"].as_array().context("cargo metadata lists no packages")?;
    let mut circles = Vec::new();
    for package in packages {
        let (name, sources) = crate_of(package).context("cargo metadata describes a package without a manifest")?;
        if !sources.is_dir() {
            continue;
        }
        let files = read_sources(&sources)?;
        circles.extend(find(&files).into_iter().map(|circle| format!("{name}: {circle}")));
    }
    if !circles.is_empty() {
        bail!("modules import each other in a circle:\n{}", circles.join("\n"));
    }
    Ok(())
}

/// The name of a package and the directory of its sources.
fn crate_of(package: &Value) -> Option<(&str, PathBuf)> {
    let manifest = Path::new(package["manifest_path"].as_str()?);
    Some((package["name"].as_str()?, manifest.parent()?.join("src")))
}

/// The text of each source file, by its path below `directory`. Programs beside the main one (`bin`) are crates of
/// their own.
fn read_sources(directory: &Path) -> Result<Vec<(PathBuf, String)>> {
    let mut files = Vec::new();
    let mut directories = vec![directory.to_owned()];
    while let Some(next) = directories.pop() {
        let entries = fs::read_dir(&next).with_context(|| format!("cannot list {}", next.display()))?;
        for entry in entries {
            let path = entry.with_context(|| format!("cannot list {}", next.display()))?.path();
            let below = path.strip_prefix(directory).unwrap_or(&path).to_owned();
            if path.is_dir() && below != Path::new("bin") {
                directories.push(path);
            } else if path.extension().is_some_and(|extension| extension == "rs") {
                let text = fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))?;
                files.push((below, text));
            }
        }
    }
    Ok(files)
}

/// One circle: the modules at its corners, and an import for each of its sides.
#[derive(Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Circle {
    corners: Vec<Module>,
    imports: Vec<(Module, Module)>,
}

impl fmt::Display for Circle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let corners: Vec<String> = self.corners.iter().chain(self.corners.first()).map(|one| one.join("::")).collect();
        write!(f, "{}: move what they share into a module of its own", corners.join(" -> "))?;
        for (from, to) in &self.imports {
            write!(f, "\n    {} imports from {}", from.join("::"), to.join("::"))?;
        }
        Ok(())
    }
}

/// The shortest circle through each module of the sources that is in one.
///
/// Modules are compared with their siblings: `a::b`, which imports from `c::d`, makes `a` depend on `c`. Every circle
/// of modules is one of siblings, too.
fn find(files: &[(PathBuf, String)]) -> BTreeSet<Circle> {
    let mut sides: BTreeMap<Module, BTreeMap<Module, (Module, Module)>> = BTreeMap::new();
    for (from, to) in imports(files) {
        let common = from.iter().zip(&to).take_while(|(a, b)| a == b).count();
        let (Some(a), Some(b)) = (from.get(..=common), to.get(..=common)) else { continue };
        sides.entry(a.to_vec()).or_default().entry(b.to_vec()).or_insert((from, to));
    }
    sides.keys().filter_map(|start| shortest_circle(&sides, start)).collect()
}

/// The shortest circle through `start`, from its first module in alphabetical order on.
fn shortest_circle(sides: &BTreeMap<Module, BTreeMap<Module, (Module, Module)>>, start: &Module) -> Option<Circle> {
    let mut before: BTreeMap<&Module, &Module> = BTreeMap::new();
    let mut next = VecDeque::from([start]);
    while let Some(from) = next.pop_front() {
        for to in sides.get(from).into_iter().flat_map(BTreeMap::keys) {
            if !before.contains_key(to) {
                before.insert(to, from);
                next.push_back(to);
            }
        }
    }
    let mut corners = vec![start];
    let mut at = *before.get(start)?;
    while at != start {
        corners.push(at);
        at = before[at];
    }
    corners.reverse();
    let first = (0..corners.len()).min_by_key(|&index| corners[index])?;
    corners.rotate_left(first);
    let ends = corners.iter().cycle().skip(1);
    let imports = corners.iter().zip(ends).map(|(from, to)| sides[*from][*to].clone()).collect();
    Some(Circle { corners: corners.into_iter().cloned().collect(), imports })
}

/// The pairs of modules of which the first imports from the second, except ancestors and their descendants.
fn imports(files: &[(PathBuf, String)]) -> BTreeSet<(Module, Module)> {
    let files: Vec<(Module, Uses)> = files.iter().map(|(path, text)| (module_of(path), uses::read(text))).collect();
    let modules: BTreeSet<&Module> = files.iter().map(|(module, _)| module).collect();
    let left_out: Vec<Module> = files
        .iter()
        .flat_map(|(module, uses)| uses.left_out.iter().map(|inside| [module.clone(), inside.clone()].concat()))
        .collect();

    let mut re_exports = BTreeMap::new();
    let mut imports = Vec::new();
    for (module, uses) in &files {
        for import in &uses.imports {
            let Some((from, item)) = resolve(&modules, module, import) else { continue };
            if import.is_exported && import.inside.is_empty() && from != *module {
                re_exports.insert((module, import.name.clone()), (from.clone(), item.clone()));
            }
            imports.push((module, from, item));
        }
    }
    let mut pairs = BTreeSet::new();
    for (module, mut from, mut item) in imports {
        for _ in 0..RE_EXPORTS_MAX {
            let Some((origin, name)) = item.as_ref().and_then(|item| re_exports.get(&(&from, item.clone()))) else {
                break;
            };
            (from, item) = (origin.clone(), name.clone());
        }
        let is_kin = module.starts_with(&from) || from.starts_with(module);
        if !is_kin && !left_out.iter().any(|test| module.starts_with(test)) {
            pairs.insert((module.clone(), from));
        }
    }
    pairs
}

/// The module of a source file.
fn module_of(path: &Path) -> Module {
    let mut module: Module =
        path.with_extension("").components().map(|part| part.as_os_str().to_string_lossy().into_owned()).collect();
    if module.last().is_some_and(|last| ["mod", "lib", "main"].contains(&last.as_str())) {
        module.pop();
    }
    module
}

/// The module that an import names, and the item in it. `None`: it is in another crate.
fn resolve(modules: &BTreeSet<&Module>, module: &Module, import: &Import) -> Option<(Module, Option<String>)> {
    let here = [module.clone(), import.inside.clone()].concat();
    let mut path = import.path.iter();
    let mut from = match path.next()?.as_str() {
        "crate" => Module::new(),
        "self" => here,
        "super" => {
            let supers = 1 + path.clone().take_while(|segment| *segment == "super").count();
            path = import.path[supers..].iter();
            here[..here.len().checked_sub(supers)?].to_vec()
        }
        child => {
            let child = [here, vec![child.to_owned()]].concat();
            if !modules.contains(&child) {
                return None;
            }
            child
        }
    };
    let item = path.find(|segment| {
        from.push((*segment).clone());
        let is_item = !modules.contains(&from);
        if is_item {
            from.pop();
        }
        is_item
    });
    // An inline module belongs to the file around it.
    while !modules.contains(&from) {
        from.pop()?;
    }
    Some((from, item.filter(|item| *item != "self").cloned()))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The circles of a crate with these files, each with the path of its corners.
    fn circles(files: &[(&str, &str)]) -> Vec<String> {
        let files: Vec<_> = files.iter().map(|(path, text)| (PathBuf::from(path), (*text).to_owned())).collect();
        let first_line = |circle: &Circle| circle.to_string().lines().next().unwrap_or_default().to_owned();
        let advice = ": move what they share into a module of its own";
        let corners = |circle| first_line(circle).strip_suffix(advice).expect("the advice").to_owned();
        find(&files).iter().map(corners).collect()
    }

    #[test]
    fn two_modules_that_import_each_other_are_a_circle() {
        let files = [
            ("lib.rs", "mod a; mod b; mod c;"),
            ("a.rs", "use super::b::B; use crate::c::C;"),
            ("b.rs", "use crate::{c::C, a::{self, A}};"),
            ("c.rs", "use std::io;"),
        ];
        assert_eq!(circles(&files), ["a -> b -> a"]);
    }

    #[test]
    fn a_longer_circle_is_reported_once() {
        let files = [
            ("lib.rs", ""),
            ("a.rs", "use crate::b::B;"),
            ("b.rs", "use crate::c::C;"),
            ("c.rs", "use crate::a::A;"),
            ("d.rs", "use crate::a::A;"),
        ];
        assert_eq!(circles(&files), ["a -> b -> c -> a"]);
    }

    #[test]
    fn folders_are_a_circle_although_no_two_of_their_modules_are() {
        let files = [
            ("lib.rs", ""),
            ("a/mod.rs", "mod x; mod y;"),
            ("a/x.rs", "use crate::b::z::Z;"),
            ("a/y.rs", ""),
            ("b.rs", "mod z; use crate::a::y::Y;"),
            ("b/z.rs", ""),
        ];
        assert_eq!(circles(&files), ["a -> b -> a"]);
        let paths = files.map(|(path, text)| (PathBuf::from(path), text.to_owned()));
        assert_eq!(
            find(&paths).pop_first().expect("a circle").to_string(),
            "a -> b -> a: move what they share into a module of its own\n    \
             a::x imports from b::z\n    b imports from a::y"
        );
    }

    #[test]
    fn siblings_below_a_folder_are_a_circle() {
        let files = [("lib.rs", ""), ("a.rs", ""), ("a/x.rs", "use super::y::Y;"), ("a/y.rs", "use super::x::X;")];
        assert_eq!(circles(&files), ["a::x -> a::y -> a::x"]);
    }

    #[test]
    fn parents_and_children_may_import_each_other() {
        let files = [
            ("lib.rs", "mod a; pub use a::A; const C: u32 = 1;"),
            ("a.rs", "mod x; pub use x::X; use self::x::y::Y; use crate::C;"),
            ("a/x.rs", "mod y; use super::A; use crate::C;"),
            ("a/x/y.rs", "use crate::a::A; use super::super::A;"),
        ];
        assert_eq!(circles(&files), [""; 0]);
    }

    #[test]
    fn a_re_export_is_followed_to_the_module_that_defines_the_name() {
        let of_parent = [
            ("lib.rs", "mod a; mod b; pub use a::A; pub(crate) use b::Original as B;"),
            ("a.rs", "use crate::B;"),
            ("b.rs", "use crate::A;"),
        ];
        assert_eq!(circles(&of_parent), ["a -> b -> a"]);
        let of_other = [("lib.rs", ""), ("a.rs", "pub use crate::c::C;"), ("b.rs", "use crate::a::C;"), ("c.rs", "")];
        assert_eq!(circles(&of_other), [""; 0]);
    }

    #[test]
    fn imports_of_tests_do_not_count() {
        let files = [
            ("lib.rs", "mod a; #[cfg(any(test, feature = \"fuzzing\"))] mod b;"),
            ("a.rs", "#[cfg(test)] mod tests { use crate::c::C; } #[cfg(doc)] use crate::c::C; use crate::b::B;"),
            ("b.rs", "use crate::a::A;"),
            ("b/x.rs", "use crate::a::A;"),
            ("c.rs", "use crate::a::A;"),
        ];
        assert_eq!(circles(&files), [""; 0]);
    }

    #[test]
    fn an_inline_module_belongs_to_its_file() {
        let files = [
            ("lib.rs", ""),
            ("a.rs", "mod inner { use super::super::b::B; pub struct I; }"),
            ("b.rs", "use crate::a::inner::I;"),
        ];
        assert_eq!(circles(&files), ["a -> b -> a"]);
    }

    #[test]
    fn programs_beside_the_main_one_are_left_out() {
        let directory = tempfile::tempdir().expect("a directory");
        for path in ["a/bin", "bin/c"] {
            fs::create_dir_all(directory.path().join(path)).expect("a directory");
        }
        for path in ["main.rs", "a/bin/x.rs", "bin/b.rs", "bin/c/main.rs", "a/README.md"] {
            fs::write(directory.path().join(path), path).expect("a file");
        }
        let mut files = read_sources(directory.path()).expect("the sources");
        files.sort();
        let read = |path: &str| (PathBuf::from(path), path.to_owned());
        assert_eq!(files, [read("a/bin/x.rs"), read("main.rs")]);
    }
}
