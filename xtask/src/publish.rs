//! The crates that are for a registry: whether each could be published as it is.

use std::{collections::HashSet, path::Path, process::Command};

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;

use crate::steps::{self, cargo};

/// The first Cargo that can package crates which depend on each other and are on no registry yet.
const PACKAGES_TOGETHER_SINCE: (u32, u32) = (1, 90);
const KEYWORDS_MAX: usize = 5;
const KEYWORD_CHARACTERS_MAX: usize = 20;

/// Packages each crate that is to be published, as `cargo publish` would.
///
/// Without building what comes out, which would take longer than all other steps but the tests: that each crate builds alone is the
/// business of [`check_alone`].
pub(crate) fn package() -> Result<()> {
    let packages = published(&metadata()?)?;
    let faults: Vec<String> = packages.iter().flat_map(Package::faults).collect();
    ensure!(faults.is_empty(), "{}", faults.join("\n"));
    let names = packages.iter().flat_map(|package| ["--package", &package.name]);
    if cargo_version()? < PACKAGES_TOGETHER_SINCE {
        println!("this Cargo cannot package crates together that are on no registry: it only lists their files");
        return packages.iter().try_for_each(|package| {
            steps::run_quietly(&mut cargo(&["package", "--list", "--allow-dirty", "--package", &package.name]))
        });
    }
    steps::run(cargo(&["package", "--quiet", "--locked", "--offline", "--no-verify", "--allow-dirty"]).args(names))
}

/// Compiles each of the crates with the features that it has when it is used alone: in a build of the whole workspace others
/// switch on more.
pub(crate) fn check_alone() -> Result<()> {
    for package in published(&metadata()?)? {
        for features in [&[][..], &["--all-features"]] {
            let check = ["check", "--quiet", "--locked", "--package", &package.name];
            steps::run(cargo(&check).args(features))?;
        }
    }
    Ok(())
}

/// Compares the public interface of the crates with that of the last release, where cargo-semver-checks is installed.
pub(crate) fn check_semver(skip: impl FnOnce(&str) -> Result<()>) -> Result<()> {
    if !steps::is_available("cargo", &["semver-checks", "--version"]) {
        return skip("needs cargo-semver-checks: cargo install cargo-semver-checks");
    }
    let Some(release) = last_release()? else {
        return skip("there is no release to compare with: no tag v*");
    };
    let packages = published(&metadata()?)?;
    let names = packages.iter().flat_map(|package| ["--package", &package.name]);
    steps::run(cargo(&["semver-checks", "--baseline-rev", &release]).args(names))
}

/// The tag of the newest release in the history of what is checked out.
fn last_release() -> Result<Option<String>> {
    let mut git = Command::new("git");
    let output =
        git.args(["describe", "--tags", "--abbrev=0", "--match", "v*"]).output().context("cannot start git")?;
    Ok(output.status.success().then(|| String::from_utf8_lossy(&output.stdout).trim().to_owned()))
}

/// What a registry gets to know of a crate.
#[derive(Debug)]
struct Package {
    name: String,
    manifest: Value,
    /// Crates of this workspace that are not for a registry.
    unpublished: HashSet<String>,
}

/// What cargo knows of the crates of the workspace.
pub(crate) fn metadata() -> Result<Value> {
    let mut command = cargo(&["metadata", "--format-version=1", "--no-deps", "--offline"]);
    let output = command.output().context("cannot start cargo metadata")?;
    ensure!(output.status.success(), "cargo metadata: {}", String::from_utf8_lossy(&output.stderr));
    serde_json::from_slice(&output.stdout).context("what cargo metadata says")
}

/// The crates of the workspace without `publish = false`, which `cargo metadata` shows as an empty list of registries.
fn published(metadata: &Value) -> Result<Vec<Package>> {
    let all = metadata["packages"].as_array().context("cargo metadata lists no packages")?;
    let name = |package: &Value| package["name"].as_str().unwrap_or_default().to_owned();
    let (unpublished, published): (Vec<_>, Vec<_>) = all.iter().partition(|package| package["publish"].is_array());
    let unpublished: HashSet<String> = unpublished.into_iter().map(name).collect();
    let package = |manifest: &Value| {
        let unpublished = unpublished.clone();
        Package { name: name(manifest), manifest: manifest.clone(), unpublished }
    };
    let packages: Vec<Package> = published.into_iter().map(package).collect();
    if packages.is_empty() {
        bail!("no crate of the workspace is to be published");
    }
    Ok(packages)
}

impl Package {
    /// What is missing before a person could find, use and trust this crate on a registry.
    fn faults(&self) -> Vec<String> {
        let mut faults = Vec::new();
        let mut must = |is_so: bool, what: &str| {
            if !is_so {
                faults.push(format!("{}: {what}", self.name));
            }
        };
        for field in ["description", "license", "repository", "readme", "rust_version"] {
            must(self.manifest[field].as_str().is_some_and(|text| !text.is_empty()), &format!("no {field}"));
        }
        let list = |field: &str| -> Vec<&str> {
            self.manifest[field].as_array().into_iter().flatten().filter_map(Value::as_str).collect()
        };
        let keywords = list("keywords");
        must((1..=KEYWORDS_MAX).contains(&keywords.len()), "no keywords, or more than 5");
        must(
            keywords.iter().all(|keyword| keyword.len() <= KEYWORD_CHARACTERS_MAX),
            "a keyword of more than 20 characters",
        );
        must(!list("categories").is_empty(), "no categories");
        must(self.manifest["metadata"]["docs"]["rs"].is_object(), "no [package.metadata.docs.rs]");
        let directory = self.manifest["manifest_path"].as_str().map(Path::new).and_then(Path::parent);
        for file in ["LICENSE-APACHE", "LICENSE-MIT"] {
            must(directory.is_some_and(|directory| directory.join(file).exists()), &format!("no {file}"));
        }
        for dependency in self.manifest["dependencies"].as_array().into_iter().flatten() {
            let name = dependency["name"].as_str().unwrap_or_default();
            // A development dependency without a version is left out of what is published.
            let is_left_out = dependency["kind"] == "dev" && dependency["req"] == "*";
            must(
                is_left_out || !self.unpublished.contains(name),
                &format!("it depends on {name}, which is not published"),
            );
            let has_version = dependency["req"] != "*";
            must(is_left_out || has_version, &format!("its dependency {name} has no version"));
        }
        faults
    }
}

/// Major and minor version of the Cargo that started this program.
fn cargo_version() -> Result<(u32, u32)> {
    let output = cargo(&["--version"]).output().context("cannot start cargo")?;
    let said = String::from_utf8_lossy(&output.stdout);
    version(&said).with_context(|| format!("cargo --version says {said:?}"))
}

/// `cargo 1.85.1 (d73d2caf9 2024-12-31)`.
fn version(said: &str) -> Option<(u32, u32)> {
    let mut numbers = said.split_whitespace().nth(1)?.split('.').map(|number| number.parse().ok());
    Some((numbers.next()??, numbers.next()??))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn complete() -> Value {
        json!({
            "name": "ringpass-guest-abi",
            "manifest_path": concat!(env!("CARGO_MANIFEST_DIR"), "/../Cargo.toml"),
            "description": "a", "license": "b", "repository": "c", "readme": "d", "rust_version": "1.85",
            "keywords": ["io_uring"], "categories": ["virtualization"], "metadata": { "docs": { "rs": {} } },
            "publish": null,
            "dependencies": [{ "name": "rustix", "req": "^1", "kind": null }],
        })
    }

    fn faults(manifest: Value) -> Vec<String> {
        let unpublished = json!({ "name": "ringpass-tests", "publish": [] });
        let packages = published(&json!({ "packages": [manifest, unpublished] })).expect("one package");
        assert_eq!(packages.len(), 1);
        packages[0].faults()
    }

    #[test]
    fn a_crate_that_lacks_something_for_a_registry_is_named_with_what_it_lacks() {
        assert_eq!(faults(complete()), [""; 0]);
        let mut lacking = complete();
        lacking["repository"] = Value::Null;
        lacking["keywords"] = json!(["a keyword that is far too long"]);
        lacking["dependencies"] = json!([
            { "name": "ringpass-tests", "req": "^0.1.0", "kind": null },
            { "name": "ringpass-tests", "req": "*", "kind": "dev" },
        ]);
        assert_eq!(
            faults(lacking),
            [
                "ringpass-guest-abi: no repository",
                "ringpass-guest-abi: a keyword of more than 20 characters",
                "ringpass-guest-abi: it depends on ringpass-tests, which is not published",
            ]
        );
    }

    #[test]
    fn the_version_of_cargo_is_read() {
        assert_eq!(version("cargo 1.85.1 (d73d2caf9 2024-12-31)\n"), Some((1, 85)));
        assert_eq!(version("cargo 1.95.0-nightly (a b)"), Some((1, 95)));
        assert_eq!(version("cargo"), None);
    }
}
