//! Gets Debian packages without installing them: an apt with lists of its own, which also knows the source packages.

use std::{
    ffi::OsStr,
    fs,
    os::unix::ffi::OsStrExt,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context, Result, ensure};

use crate::interruption;

/// Where a Debian-like system says which repositories it uses (sources.list(5)).
const SYSTEM_SOURCES: &str = "/etc/apt";

/// An apt that uses the machine's repositories, proxy and keys, and changes nothing of the machine.
#[derive(Debug)]
pub(crate) struct Apt {
    configuration: PathBuf,
    /// The directory for packages that are downloaded with everything that they depend on.
    downloads: PathBuf,
    /// The output of the update: if a package is missing later, it has the cause.
    update: String,
}

impl Apt {
    /// Makes an apt whose files are in `directory`, and gets the lists of packages of the machine's repositories, source
    /// packages included.
    ///
    /// # Errors
    ///
    /// The files cannot be written, or there is no apt. An unreachable repository is not an error yet: others may have
    /// the packages.
    pub(crate) fn new(directory: &Path) -> Result<Self> {
        let sources = system_sources()?;
        Self::with_sources(
            directory,
            sources.iter().map(|(name, text)| (name.as_str(), with_source_packages(text))),
            "",
        )
    }

    /// Makes an apt for another release of Debian, with the mirror of this machine, and as if no package were
    /// installed.
    ///
    /// # Errors
    ///
    /// As [`new`](Self::new); or the machine uses no repository of Debian.
    pub(crate) fn of_release(directory: &Path, suite: &str) -> Result<Self> {
        let repository = debian_repository(&system_sources()?).context("/etc/apt names no repository of Debian")?;
        fs::write(directory.join("status"), "").context("cannot write an empty list of installed packages")?;
        // A mirror may lag behind the date at which its lists expire. They are signed all the same, and guests are thrown
        // away.
        let further =
            format!("Dir::State::status \"{}/status\";\nAcquire::Check-Valid-Until \"false\";\n", directory.display());
        Self::with_sources(directory, [("debian.sources", repository.of_suite(suite))], &further)
    }

    fn with_sources<'a>(
        directory: &Path,
        lists: impl IntoIterator<Item = (&'a str, String)>,
        further_configuration: &str,
    ) -> Result<Self> {
        let sources = directory.join("sources.list.d");
        for made in [&sources, &directory.join("lists/partial"), &directory.join("cache/archives/partial")] {
            fs::create_dir_all(made).with_context(|| format!("cannot make {}", made.display()))?;
        }
        for (name, text) in lists {
            fs::write(sources.join(name), text).context("cannot write the list of repositories")?;
        }
        let configuration = directory.join("apt.conf");
        let text = configuration_text(directory) + further_configuration;
        fs::write(&configuration, text).context("cannot write apt's configuration")?;
        let mut apt = Self { configuration, downloads: directory.join("cache/archives"), update: String::new() };
        let output = apt.command("apt-get").arg("update").output().context("cannot start apt-get")?;
        apt.update = String::from_utf8_lossy(&output.stderr).trim().to_owned();
        Ok(apt)
    }

    /// The package with the highest version in its name, of those called `<prefix><version><suffix>`.
    ///
    /// # Errors
    ///
    /// There is none.
    pub(crate) fn newest_named(&self, prefix: &str, suffix: &str) -> Result<String> {
        let names = self.run("apt-cache", ["pkgnames", prefix])?;
        newest_named(names.lines(), prefix, suffix)
            .with_context(|| format!("the machine's repositories have no package {prefix}*{suffix}. {}", self.update))
    }

    /// The version of a package that [`unpack`](Self::unpack) unpacks.
    ///
    /// # Errors
    ///
    /// There is no such package.
    pub(crate) fn version(&self, package: &str) -> Result<String> {
        let fields = self.run("apt-cache", ["show", "--no-all-versions", package])?;
        let version = fields.lines().find_map(|line| line.strip_prefix("Version: "));
        version.map(str::to_owned).with_context(|| format!("{package} has no version"))
    }

    /// The names of the packages on which a package depends directly, the first of alternatives each.
    ///
    /// # Errors
    ///
    /// There is no such package.
    pub(crate) fn depends(&self, package: &str) -> Result<Vec<String>> {
        let fields = self.run("apt-cache", ["show", "--no-all-versions", package])?;
        let depends = fields.lines().find_map(|line| line.strip_prefix("Depends: ")).unwrap_or_default();
        Ok(depends.split(',').filter_map(|name| Some(name.split_whitespace().next()?.to_owned())).collect())
    }

    /// Downloads a package and unpacks its files into `directory`. Nothing is installed.
    ///
    /// # Errors
    ///
    /// It cannot be downloaded or unpacked.
    pub(crate) fn unpack(&self, package: &str, directory: &Path) -> Result<()> {
        let downloads = tempfile::tempdir_in(directory).context("cannot make a directory for a download")?;
        self.run_in(downloads.path(), "apt-get", ["download", package])?;
        let archive = only_file(downloads.path(), ".deb")?;
        run(Command::new("dpkg").arg("--extract").arg(archive).arg(directory)).map(drop)
    }

    /// Downloads packages with everything that they depend on and that is not installed, and unpacks the files of all of them
    /// into `directory`, an empty one. Nothing is installed, so no script of a package runs.
    ///
    /// # Errors
    ///
    /// One of them cannot be downloaded or unpacked.
    pub(crate) fn unpack_with_dependencies(&self, packages: &[&str], directory: &Path) -> Result<()> {
        let install = ["install", "--yes", "--download-only", "--no-install-recommends"];
        self.run("apt-get", install.into_iter().chain(packages.iter().copied()))?;
        // The package with the symbolic links between /bin and /usr/bin must come first.
        let base_first =
            |path: &PathBuf| !path.file_name().is_some_and(|name| name.as_bytes().starts_with(b"base-files_"));
        let mut archives = files(&self.downloads, ".deb")?;
        archives.sort_by_key(base_first);
        for archive in archives {
            run(Command::new("dpkg").arg("--extract").arg(archive).arg(directory))?;
        }
        Ok(())
    }

    /// Downloads a source package and unpacks the original sources (without Debian's changes) into `directory`.
    ///
    /// # Errors
    ///
    /// It cannot be downloaded or unpacked.
    pub(crate) fn unpack_source(&self, package: &str, directory: &Path) -> Result<()> {
        let downloads = tempfile::tempdir_in(directory).context("cannot make a directory for a download")?;
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
        // The configuration is an argument, not in APT_CONFIG: apt reads APT_CONFIG before the machine's own files, so
        // it could not override them.
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

/// Runs a program to its end, and returns its output.
pub(crate) fn run(command: &mut Command) -> Result<String> {
    interruption::check()?;
    let output =
        command.output().with_context(|| format!("cannot start {}", command.get_program().to_string_lossy()))?;
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
         // The machine's own hooks after an update of its lists.\n\
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
            // The `deb` line makes this line too.
        } else if line.to_ascii_lowercase().starts_with("types:") {
            result.push_str("Types: deb deb-src\n");
        } else {
            result.push_str(line);
            result.push('\n');
        }
    }
    result
}

/// A repository of Debian.
#[derive(Debug, PartialEq, Eq)]
struct DebianRepository {
    uri: String,
    /// A file of keys, if the machine's list names one.
    signed_by: Option<String>,
}

impl DebianRepository {
    /// A list of repositories (deb822 format) with the main section of one suite.
    fn of_suite(&self, suite: &str) -> String {
        let signed_by = self.signed_by.as_ref().map(|keys| format!("Signed-By: {keys}\n")).unwrap_or_default();
        format!("Types: deb\nURIs: {}\nSuites: {suite}\nComponents: main\n{signed_by}", self.uri)
    }
}

/// The first repository of Debian in the machine's lists, in both formats of sources.list(5). By convention its URI ends with
/// `/debian`.
fn debian_repository(sources: &[(String, String)]) -> Option<DebianRepository> {
    let is_debian = |uri: &&str| uri.trim_end_matches('/').ends_with("/debian");
    sources.iter().flat_map(|(_, text)| text.split("\n\n")).find_map(|stanza| {
        let field = |name: &str| stanza.lines().find_map(|line| line.strip_prefix(name)).map(str::trim);
        if let Some(uri) = field("URIs:").and_then(|uris| uris.split_whitespace().find(is_debian)) {
            return Some(DebianRepository { uri: uri.into(), signed_by: field("Signed-By:").map(str::to_owned) });
        }
        stanza.lines().find_map(|line| {
            let words = line.strip_prefix("deb ")?;
            let uri = words.split_whitespace().find(is_debian)?;
            let signed_by = words.split_once("signed-by=").and_then(|(_, keys)| keys.split([' ', ']']).next());
            Some(DebianRepository { uri: uri.into(), signed_by: signed_by.map(str::to_owned) })
        })
    })
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
    let mut found = files(directory, suffix)?;
    let file = found.pop().with_context(|| format!("no file *{suffix} was downloaded"))?;
    ensure!(found.is_empty(), "several files *{suffix} were downloaded");
    Ok(file)
}

fn files(directory: &Path, suffix: &str) -> Result<Vec<PathBuf>> {
    let entries = fs::read_dir(directory).with_context(|| format!("cannot read {}", directory.display()))?;
    let files = entries.filter_map(|entry| Some(entry.ok()?.path()));
    Ok(files.filter(|path| path.as_os_str().as_bytes().ends_with(suffix.as_bytes())).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn newest_named_compares_versions_by_number() {
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
    fn debian_repository_reads_both_formats() {
        let found = |text: &str| debian_repository(&[(String::new(), text.to_owned())]);
        let repository = |signed_by: Option<&str>| {
            Some(DebianRepository { uri: "http://mirror/debian".into(), signed_by: signed_by.map(str::to_owned) })
        };
        let stanzas = "# other\nTypes: deb\nURIs: http://mirror/other\nSuites: a\n\n\
                       Types: deb\nURIs: http://mirror/debian\nSuites: bookworm bookworm-updates\nSigned-By: /keys\n";
        assert_eq!(found(stanzas), repository(Some("/keys")));
        let lines = "deb http://mirror/debian-security bookworm-security main\n\
                     deb [arch=amd64 signed-by=/keys] http://mirror/debian bookworm main\n";
        assert_eq!(found(lines), repository(Some("/keys")));
        assert_eq!(found("deb http://mirror/debian bookworm main\n"), repository(None));
        assert_eq!(found("deb http://mirror/ubuntu noble main\n"), None);
        assert_eq!(
            repository(Some("/keys")).map(|repository| repository.of_suite("trixie")).as_deref(),
            Some("Types: deb\nURIs: http://mirror/debian\nSuites: trixie\nComponents: main\nSigned-By: /keys\n")
        );
    }

    #[test]
    fn with_source_packages_extends_both_formats() {
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
