//! Kernel modules and their dependencies, in the order in which the guest can load them.

use std::{
    collections::HashMap,
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context, Result, bail, ensure};

/// A module, uncompressed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Module {
    /// As in `/sys/module`: with underscores.
    pub(super) name: String,
    /// The ELF file.
    pub(super) object: Vec<u8>,
}

/// The modules of one kernel, unpacked from its package.
#[derive(Debug)]
pub(super) struct ModuleTree {
    files: HashMap<String, PathBuf>,
    builtin: Vec<String>,
    /// A busybox that can uncompress them.
    busybox: PathBuf,
}

impl ModuleTree {
    /// Looks at `lib/modules/<release>`.
    ///
    /// # Errors
    ///
    /// The directory cannot be read.
    pub(super) fn new(directory: &Path, busybox: &Path) -> Result<Self> {
        let mut files = HashMap::new();
        let mut directories = vec![directory.join("kernel")];
        while let Some(directory) = directories.pop() {
            for entry in fs::read_dir(&directory).with_context(|| format!("cannot read {}", directory.display()))? {
                let path = entry?.path();
                if path.is_dir() {
                    directories.push(path);
                } else if let Some(name) = module_name(&path) {
                    files.insert(name, path);
                }
            }
        }
        let builtin = fs::read_to_string(directory.join("modules.builtin")).context("cannot read modules.builtin")?;
        let builtin = builtin.lines().filter_map(|line| module_name(Path::new(line))).collect();
        Ok(Self { files, builtin, busybox: busybox.to_owned() })
    }

    /// A module behind all modules that it needs. The list is empty if the module is built into the kernel.
    ///
    /// # Errors
    ///
    /// There is no such module, or it cannot be uncompressed.
    pub(super) fn load_order(&self, name: &str) -> Result<Vec<Module>> {
        let mut order = Vec::new();
        self.add(name, &mut order, 0)?;
        Ok(order)
    }

    fn add(&self, name: &str, order: &mut Vec<Module>, depth: u32) -> Result<()> {
        ensure!(depth < 32, "{name} needs itself");
        let name = name.replace('-', "_");
        if self.builtin.contains(&name) || order.iter().any(|module| module.name == name) {
            return Ok(());
        }
        let path = self.files.get(&name).with_context(|| format!("the kernel has no module {name}"))?;
        let object = self.read(path)?;
        for needed in depends(&object) {
            self.add(&needed, order, depth + 1).with_context(|| format!("which {name} needs"))?;
        }
        order.push(Module { name, object });
        Ok(())
    }

    fn read(&self, path: &Path) -> Result<Vec<u8>> {
        match path.extension().and_then(|extension| extension.to_str()) {
            Some("ko") => fs::read(path).with_context(|| format!("cannot read {}", path.display())),
            Some("xz") => {
                let output = Command::new(&self.busybox).args(["unxz", "-c"]).arg(path).output().context("busybox")?;
                ensure!(output.status.success(), "unxz {}: {}", path.display(), output.status);
                Ok(output.stdout)
            }
            _ => bail!("{} has an unknown compression", path.display()),
        }
    }
}

/// `…/virtio-rng.ko.xz` is `virtio_rng`.
fn module_name(path: &Path) -> Option<String> {
    let (name, _) = path.file_name()?.to_str()?.split_once(".ko")?;
    Some(name.replace('-', "_"))
}

/// The modules that a module names as needed: `depends=a,b` in its section of strings (`Documentation/kbuild/modules.rst`).
fn depends(object: &[u8]) -> Vec<String> {
    const FIELD: &[u8] = b"\0depends=";
    let Some(at) = object.windows(FIELD.len()).position(|window| window == FIELD) else { return Vec::new() };
    let value = object[at + FIELD.len()..].split(|byte| *byte == 0).next().unwrap_or_default();
    String::from_utf8_lossy(value).split(',').filter(|name| !name.is_empty()).map(str::to_owned).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tree(modules: &[(&str, &str)], builtin: &str) -> (tempfile::TempDir, ModuleTree) {
        let directory = tempfile::tempdir().expect("a directory");
        let drivers = directory.path().join("kernel/drivers");
        fs::create_dir_all(&drivers).expect("a directory");
        for (name, depends) in modules {
            let object = format!("ELF\0license=GPL\0depends={depends}\0name={name}\0");
            fs::write(drivers.join(format!("{name}.ko")), object).expect("a file");
        }
        fs::write(directory.path().join("modules.builtin"), builtin).expect("a file");
        let tree = ModuleTree::new(directory.path(), Path::new("/no/busybox")).expect("a tree");
        (directory, tree)
    }

    #[test]
    fn the_load_order_has_each_needed_module_once_before_the_module() {
        let (_directory, tree) = tree(
            &[("null_blk", "configfs,dm-mod"), ("configfs", ""), ("dm-mod", "configfs,dax"), ("other", "")],
            "kernel/drivers/dax.ko\n",
        );
        let order = tree.load_order("null_blk").expect("an order");
        assert_eq!(
            order.iter().map(|module| module.name.as_str()).collect::<Vec<_>>(),
            ["configfs", "dm_mod", "null_blk"]
        );
        assert_eq!(tree.load_order("dax").expect("built in"), []);
    }

    #[test]
    fn the_error_names_a_missing_module_and_the_module_that_needs_it() {
        let (_directory, tree) = tree(&[("a", "b")], "");
        let refusal = format!("{:#}", tree.load_order("a").expect_err("no b"));
        assert_eq!(refusal, "which a needs: the kernel has no module b");
    }
}
