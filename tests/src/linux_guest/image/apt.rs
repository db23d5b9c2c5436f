//! Debian packages without installing them: an apt with lists of its own, which also knows the source packages.

use std::{
    ffi::OsStr,
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context, Result, ensure};

/// Where a Debian-like system says which repositories it uses (sources.list(5)).
const SYSTEM_SOURCES: &str = "/etc/apt";

/// An apt that uses the machine's repositories, proxy and keys, and changes nothing of the machine.
#[derive(Debug)]
pub(super) struct Apt {
    configuration: PathBuf,
    /// What the update said: the cause, if a package is missing later.
    update: String,
}

impl Apt {
    /// Makes an apt whose files are in `directory`, and gets the lists of packages.
    ///
    /// # Errors
    ///
    /// The files cannot be written, or there is no apt. That a repository cannot be reached is no error yet: others
    /// may have what is needed.
    pub(super) fn new(directory: &Path) -> Result<Self> {
        let sources = directory.join("sources.list.d");
        for made in [&sources, &directory.join("lists/partial"), &directory.join("cache/archives/partial")] {
            fs::create_dir_all(made).with_context(|| format!("making {}", made.display()))?;
        }
        for (name, text) in system_sources()? {
            fs::write(sources.join(name), with_source_packages(&text)).context("writing the list of repositories")?;
        }
        let configuration = directory.join("apt.conf");
        fs::write(&configuration, configuration_text(directory)).context("writing apt's configuration")?;
        let mut apt = Self { configuration, update: String::new() };
        let output = apt.command("apt-get").arg("update").output().context("starting apt-get")?;
        apt.update = String::from_utf8_lossy(&output.stderr).trim().to_owned();
        Ok(apt)
    }

    /// The package with the highest version in its name, of those called `<prefix><version><suffix>`.
    ///
    /// # Errors
    ///
    /// There is none.
    pub(super) fn newest_named(&self, prefix: &str, suffix: &str) -> Result<String> {
        let names = self.run("apt-cache", ["pkgnames", prefix])?;
        newest_named(names.lines(), prefix, suffix)
            .with_context(|| format!("the machine's repositories have no package {prefix}*{suffix}. {}", self.update))
    }

    /// The version of a package that [`unpack`](Self::unpack) unpacks.
    ///
    /// # Errors
    ///
    /// There is no such package.
    pub(super) fn version(&self, package: &str) -> Result<String> {
        let fields = self.run("apt-cache", ["show", "--no-all-versions", package])?;
        let version = fields.lines().find_map(|line| line.strip_prefix("Version: "));
        version.map(str::to_owned).with_context(|| format!("{package} has no version"))
    }

    /// Downloads a package and unpacks its files into `directory`. Nothing is installed.
    ///
    /// # Errors
    ///
    /// It cannot be downloaded or unpacked.
    pub(super) fn unpack(&self, package: &str, directory: &Path) -> Result<()> {
        let downloads = tempfile::tempdir_in(directory).context("making a directory for a download")?;
        self.run_in(downloads.path(), "apt-get", ["download", package])?;
        let archive = only_file(downloads.path(), ".deb")?;
        run(Command::new("dpkg").arg("--extract").arg(archive).arg(directory)).map(drop)
    }

    /// Downloads a source package and unpacks the original sources (without Debian's changes) into `directory`.
    ///
    /// # Errors
    ///
    /// It cannot be downloaded or unpacked.
    pub(super) fn unpack_source(&self, package: &str, directory: &Path) -> Result<()> {
        let downloads = tempfile::tempdir_in(directory).context("making a directory for a download")?;
        self.run_in(downloads.path(), "apt-get", ["source", "--download-only", package])?;
        let archive = only_file(downloads.path(), ".orig.tar.gz")
            .or_else(|_| only_file(downloads.path(), ".orig.tar.xz"))
            .or_else(|_| only_file(downloads.path(), ".orig.tar.bz2"))?;
        let mut tar = Command::new("tar");
        tar.args(["--extract", "--strip-components=1", "--file"]).arg(archive).arg("--directory").arg(directory);
        run(&mut tar).map(drop)
    }

    fn command(&self, program: &str) -> Command {
        let mut command = Command::new(program);
        // As an argument, not in APT_CONFIG: that is read before the machine's own files, and could not take back
        // what they have.
        command.arg("--config-file").arg(&self.configuration);
        command
    }

    fn run<'a>(&self, program: &str, arguments: impl IntoIterator<Item = &'a str>) -> Result<String> {
        run(self.command(program).args(arguments)).with_context(|| self.update.clone())
    }

    fn run_in<'a>(
        &self,
        directory: &Path,
        program: &str,
        arguments: impl IntoIterator<Item = &'a str>,
    ) -> Result<String> {
        run(self.command(program).args(arguments).current_dir(directory)).with_context(|| self.update.clone())
    }
}

/// Runs a program to its end and gives what it wrote.
pub(super) fn run(command: &mut Command) -> Result<String> {
    let output = command.output().with_context(|| format!("starting {}", command.get_program().display()))?;
    let said = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "{command:?}: {}: {}", output.status, tail(&said));
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

fn tail(text: &str) -> String {
    let lines: Vec<&str> = text.trim().lines().collect();
    lines[lines.len().saturating_sub(10)..].join("\n")
}

fn configuration_text(directory: &Path) -> String {
    let directory = directory.display();
    format!(
        "Dir::State::lists \"{directory}/lists\";\n\
         Dir::Cache \"{directory}/cache\";\n\
         Dir::Etc::sourcelist \"/dev/null\";\n\
         Dir::Etc::sourceparts \"{directory}/sources.list.d\";\n\
         // Root's downloads go to directories that the user _apt cannot write.\n\
         APT::Sandbox::User \"root\";\n\
         Acquire::Languages \"none\";\n\
         Acquire::IndexTargets::deb::DEP-11::DefaultEnabled \"false\";\n\
         // What the machine does after an update of its own lists.\n\
         #clear APT::Update;\n"
    )
}

/// The names and texts of the machine's lists of repositories.
fn system_sources() -> Result<Vec<(String, String)>> {
    let directory = Path::new(SYSTEM_SOURCES);
    let mut files = vec![directory.join("sources.list")];
    if let Ok(parts) = fs::read_dir(directory.join("sources.list.d")) {
        files.extend(parts.filter_map(|entry| Some(entry.ok()?.path())));
    }
    let sources: Vec<_> = files
        .into_iter()
        .filter(|file| [OsStr::new("list"), OsStr::new("sources")].map(Some).contains(&file.extension()))
        .filter_map(|file| Some((file.file_name()?.to_str()?.to_owned(), fs::read_to_string(&file).ok()?)))
        .collect();
    ensure!(!sources.is_empty(), "{SYSTEM_SOURCES} names no repositories: this needs a Debian-like system");
    Ok(sources)
}

/// The same repositories with their source packages, in both formats of sources.list(5).
fn with_source_packages(text: &str) -> String {
    let mut result = String::new();
    for line in text.lines() {
        if let Some(rest) = line.strip_prefix("deb ") {
            result.push_str(&format!("deb {rest}\ndeb-src {rest}\n"));
        } else if line.starts_with("deb-src ") {
            // Made from the `deb` line.
        } else if line.to_ascii_lowercase().starts_with("types:") {
            result.push_str("Types: deb deb-src\n");
        } else {
            result.push_str(line);
            result.push('\n');
        }
    }
    result
}

fn newest_named<'a>(names: impl Iterator<Item = &'a str>, prefix: &str, suffix: &str) -> Option<String> {
    let version = |name: &'a str| name.strip_prefix(prefix)?.strip_suffix(suffix);
    // All numbers in the version, in their order: 6.12.117+deb12 is 6, 12, 117, 12.
    let numbers = |version: &str| -> Vec<u64> {
        version.split(|c: char| !c.is_ascii_digit()).filter_map(|digits| digits.parse().ok()).collect()
    };
    names.filter_map(|name| Some((numbers(version(name)?), name))).max().map(|(_, name)| name.to_owned())
}

fn only_file(directory: &Path, suffix: &str) -> Result<PathBuf> {
    let mut found = fs::read_dir(directory)?
        .filter_map(|entry| Some(entry.ok()?.path()))
        .filter(|path| path.to_str().is_some_and(|path| path.ends_with(suffix)));
    let file = found.next().with_context(|| format!("no file *{suffix} was downloaded"))?;
    ensure!(found.next().is_none(), "several files *{suffix} were downloaded");
    Ok(file)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_newest_of_a_series_is_chosen_by_number() {
        let names = [
            "linux-image-6.12-cloud-amd64-dbg",
            "linux-image-6.12.99+deb12-cloud-amd64-unsigned",
            "linux-image-6.12.117+deb12-cloud-amd64-unsigned",
            "linux-image-6.12.117+deb12-cloud-amd64-dbg",
            "linux-image-6.1.0-9-cloud-amd64-unsigned",
            "linux-image-6.1.0-48-cloud-amd64-unsigned",
        ];
        let newest =
            |series: &str| newest_named(names.into_iter(), &format!("linux-image-{series}."), "-cloud-amd64-unsigned");
        assert_eq!(newest("6.12").as_deref(), Some("linux-image-6.12.117+deb12-cloud-amd64-unsigned"));
        assert_eq!(newest("6.1").as_deref(), Some("linux-image-6.1.0-48-cloud-amd64-unsigned"));
        assert_eq!(newest("6.6"), None);
    }

    #[test]
    fn source_packages_come_from_the_same_repositories_in_both_formats() {
        assert_eq!(
            with_source_packages("# main\ndeb [arch=amd64] http://a b main\ndeb-src http://a b main\n"),
            "# main\ndeb [arch=amd64] http://a b main\ndeb-src [arch=amd64] http://a b main\n"
        );
        assert_eq!(
            with_source_packages("Types: deb\nURIs: http://a\nSigned-By: /k\n"),
            "Types: deb deb-src\nURIs: http://a\nSigned-By: /k\n"
        );
    }
}
