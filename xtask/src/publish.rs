//! The crates that are for a registry: whether each could be published as it is.

use std::{
    collections::HashSet,
    env, fs,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;

use crate::steps::{self, cargo};

/// The first Cargo that can package crates which depend on each other and are on no registry yet.
const PACKAGES_TOGETHER_SINCE: (u32, u32) = (1, 90);
/// No address in this domain exists (RFC 2606).
const PLACEHOLDER_DOMAIN: &str = ".example";
/// Where people read how to report a vulnerability.
const SECURITY: &str = "SECURITY.md";
const KEYWORDS_MAX: usize = 5;
const KEYWORD_CHARACTERS_MAX: usize = 20;

/// What Cargo reports when it cannot reach the registry's index: numbers of errors of libcurl
/// (<https://curl.se/libcurl/c/libcurl-errors.html>) for a proxy or host without an address, a refused or broken
/// connection, a timeout, and a failed TLS handshake.
const CURL_CANNOT_REACH: [&str; 8] = ["[5]", "[6]", "[7]", "[28]", "[35]", "[52]", "[55]", "[56]"];
/// What Cargo reports when its configuration forbids the network.
const IS_OFFLINE: &str = "attempting to make an HTTP request, but --offline was specified";

/// Packages each crate that is to be published, as `cargo publish` would, and compiles each package. This finds files that
/// the crate needs but does not include. It needs no network.
///
/// An older Cargo cannot package crates together that are on no registry. There this function lists the files only, and
/// [`check_alone`] compiles the crates.
pub(crate) fn package() -> Result<()> {
    let metadata = metadata()?;
    let packages = published(&metadata)?;
    let faults: Vec<String> = packages.iter().flat_map(Package::faults).collect();
    ensure!(faults.is_empty(), "{}", faults.join("\n"));
    if !packages_together()? {
        println!("this Cargo cannot package crates together that are on no registry: it only lists their files");
        return packages.iter().try_for_each(|package| {
            steps::run_quietly(&mut cargo(&["package", "--list", "--allow-dirty", "--package", &package.name]))
        });
    }
    let target = metadata["target_directory"].as_str().context("cargo metadata names no target directory")?;
    let target = Path::new(target).join("packaging");
    forget_former_packages(&packages, &target)?;
    let mut command = cargo(&["package", "--quiet", "--locked", "--offline", "--allow-dirty"]);
    // Only the verdict of the compiler counts.
    command.args(names(&packages)).env("CARGO_PROFILE_DEV_DEBUG", "false").env("CARGO_INCREMENTAL", "0");
    command.arg("--target-dir").arg(target);
    steps::run(&mut command)
}

/// Cargo compiles a package with the packages of the crates that it needs, from a registry in the target directory. It
/// unpacks and compiles those once for each version, and would take what an earlier run has left for the crates of today.
fn forget_former_packages(packages: &[Package], target: &Path) -> Result<()> {
    if target.exists() {
        fs::remove_dir_all(target).with_context(|| format!("cannot remove {}", target.display()))?;
    }
    let home = env::var_os("CARGO_HOME").map(PathBuf::from);
    let home = home.or_else(|| Some(PathBuf::from(env::var_os("HOME")?).join(".cargo")));
    let Some(registries) = home.and_then(|home| fs::read_dir(home.join("registry/src")).ok()) else { return Ok(()) };
    for registry in registries {
        let registry = registry.context("cannot list Cargo's registries")?;
        // A registry without a host is a directory.
        if !registry.file_name().to_string_lossy().starts_with('-') {
            continue;
        }
        for package in packages {
            let unpacked = registry.path().join(format!("{}-{}", package.name, package.version()));
            if unpacked.exists() {
                fs::remove_dir_all(&unpacked).with_context(|| format!("cannot remove {}", unpacked.display()))?;
            }
        }
    }
    Ok(())
}

/// Runs `cargo publish --dry-run` for each crate that is to be published. If the registry's index cannot be reached, this
/// is skipped with the reason; every other error is a failure.
///
/// It does not compile the packages: [`package`] has compiled the same packages.
pub(crate) fn dry_run(skip: impl FnOnce(&str) -> Result<()>) -> Result<()> {
    if !packages_together()? {
        return skip("needs cargo 1.90: an older one cannot publish crates together that are on no registry");
    }
    let packages = published(&metadata()?)?;
    let mut command = cargo(&["publish", "--dry-run", "--no-verify", "--locked", "--allow-dirty"]);
    // By name, so that Cargo also finds the index where its configuration replaces it with a mirror.
    command.args(["--registry", "crates-io"]).args(names(&packages));
    match try_dry_run(&mut command)? {
        None => Ok(()),
        Some(cause) => skip(&format!("cargo cannot reach the registry's index: {cause}")),
    }
}

/// Publishes all crates that are to be published. Refuses while an address in this repository is a placeholder.
pub(crate) fn run() -> Result<()> {
    let packages = published(&metadata()?)?;
    let mut placeholders: Vec<String> = packages.iter().filter_map(Package::placeholder).collect();
    let security = fs::read_to_string(SECURITY).with_context(|| format!("cannot read {SECURITY}"))?;
    if security.contains(PLACEHOLDER_DOMAIN) {
        placeholders.push(format!("{SECURITY}: an address under {PLACEHOLDER_DOMAIN}"));
    }
    ensure!(
        placeholders.is_empty(),
        "these addresses are placeholders; write the public ones before the first release:\n{}",
        placeholders.join("\n")
    );
    steps::run(cargo(&["publish", "--locked"]).args(names(&packages)))
}

/// Runs the command and shows its output. Returns what kept it from the index, if that is why it failed.
fn try_dry_run(command: &mut Command) -> Result<Option<String>> {
    let line = steps::command_line(command);
    println!("$ {line}");
    let output = command.stdin(Stdio::null()).output().with_context(|| format!("cannot start `{line}`"))?;
    let said = String::from_utf8_lossy(&output.stderr);
    eprint!("{said}");
    if output.status.success() {
        return Ok(None);
    }
    match unreachable_index(&said) {
        Some(cause) => Ok(Some(cause.to_owned())),
        None => bail!("`{line}` failed: {}", output.status),
    }
}

/// The cause in the messages of a Cargo that failed because it could not reach the index.
fn unreachable_index(said: &str) -> Option<&str> {
    let error = said.split_once("error: ")?.1;
    if error.starts_with(IS_OFFLINE) {
        return error.lines().next();
    }
    let (_, causes) = error.split_once("failed to download from `")?;
    causes.lines().map(str::trim).find(|line| CURL_CANNOT_REACH.iter().any(|number| line.starts_with(number)))
}

/// Compiles each of the crates with the features that it has when it is used alone: in a build of the whole workspace others
/// switch on more. [`package`] compiles them with their default features.
pub(crate) fn check_alone() -> Result<()> {
    let default_features = (!packages_together()?).then_some(&[][..]);
    for package in published(&metadata()?)? {
        for features in default_features.into_iter().chain([&["--all-features"][..]]) {
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
    steps::run(cargo(&["semver-checks", "--baseline-rev", &release]).args(names(&packages)))
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

/// The options that choose these packages.
fn names(packages: &[Package]) -> impl Iterator<Item = &str> {
    packages.iter().flat_map(|package| ["--package", &package.name])
}

impl Package {
    fn version(&self) -> &str {
        self.manifest["version"].as_str().unwrap_or_default()
    }

    /// The field whose address is a placeholder, with the address.
    fn placeholder(&self) -> Option<String> {
        let repository = self.manifest["repository"].as_str()?;
        let is_placeholder = repository.split('/').any(|part| part.ends_with(PLACEHOLDER_DOMAIN));
        is_placeholder.then(|| format!("{}: repository = {repository:?}", self.name))
    }

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

/// Whether Cargo can package crates together that depend on each other and are on no registry.
fn packages_together() -> Result<bool> {
    Ok(cargo_version()? >= PACKAGES_TOGETHER_SINCE)
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
    fn a_placeholder_is_no_address_to_publish() {
        let package = |repository: &str| Package {
            name: "a".into(),
            manifest: json!({ "repository": repository }),
            unpublished: HashSet::new(),
        };
        assert_eq!(
            package("https://ringpass.example/ringpass").placeholder().as_deref(),
            Some("a: repository = \"https://ringpass.example/ringpass\"")
        );
        assert_eq!(package("https://code.org/ringpass.examples").placeholder(), None);
    }

    /// A dry run for a crate of its own, with a proxy that does not answer.
    fn dry_run_without_network(manifest: &str) -> Result<Option<String>> {
        let directory = tempfile::tempdir().expect("a directory");
        let package = "[package]\nname = \"ringpass-unreachable\"\nversion = \"0.1.0\"\nedition = \"2021\"\n";
        fs::write(directory.path().join("Cargo.toml"), format!("{package}{manifest}\n[workspace]\n")).expect("a file");
        fs::create_dir(directory.path().join("src")).expect("a directory");
        fs::write(directory.path().join("src/lib.rs"), "").expect("a file");
        let mut command = cargo(&["publish", "--dry-run", "--no-verify", "--allow-dirty", "--registry", "crates-io"]);
        command.current_dir(&directory).env("CARGO_HTTP_PROXY", "http://127.0.0.1:1").env("CARGO_NET_RETRY", "0");
        // An own home: the index may be in the cache of the usual one.
        try_dry_run(command.env("CARGO_HOME", directory.path().join("home")).env_remove("CARGO_NET_OFFLINE"))
    }

    #[test]
    fn a_dry_run_without_network_is_told_from_one_that_fails() {
        let cause = dry_run_without_network("license = \"MIT\"").expect("no failure").expect("no network");
        assert!(cause.starts_with("[7] "), "{cause}");
        let error = dry_run_without_network("publish = false").expect_err("the crate is not to be published");
        assert!(error.to_string().contains("failed: exit status: 101"), "{error}");
    }

    #[test]
    fn only_an_index_out_of_reach_is_a_reason_to_skip() {
        let about_index = |cause: &str| {
            format!(
                "    Updating crates.io index\nerror: failed to get `x` as a dependency\n\nCaused by:\n  failed to \
                 download from `https://index.crates.io/config.json`\n\nCaused by:\n  {cause}\n"
            )
        };
        for cause in ["[6] Could not resolve hostname", "[28] Timeout was reached", "[56] CONNECT tunnel failed"] {
            assert_eq!(unreachable_index(&about_index(cause)), Some(cause));
        }
        assert_eq!(unreachable_index(&format!("error: {IS_OFFLINE}\n")), Some(IS_OFFLINE));
        for other in [
            about_index("[60] SSL peer certificate was not OK").as_str(),
            "warning: spurious network error: [7] Could not connect\nerror: 1 files in the working directory",
            "error: failed to select a version for `x`",
        ] {
            assert_eq!(unreachable_index(other), None, "{other}");
        }
    }

    #[test]
    fn the_version_of_cargo_is_read() {
        assert_eq!(version("cargo 1.85.1 (d73d2caf9 2024-12-31)\n"), Some((1, 85)));
        assert_eq!(version("cargo 1.95.0-nightly (a b)"), Some((1, 95)));
        assert_eq!(version("cargo"), None);
    }
}
