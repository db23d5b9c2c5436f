//! The restriction policy for a program's rings, from the command line.

use std::fs::File;
use std::io::Read;
use std::path::Path;

use anyhow::{Context, anyhow, ensure};
use clap::Args;
use ringpass_restrictions::{Access, BuiltIn, CompileError, CompiledPolicy, KernelSupport, Policy, PolicyFile};

/// Far larger than a file that names every operation and flag.
const FILE_BYTES_MAX: u64 = 256 << 10;

/// Options that choose the policy of a program's rings.
#[derive(Clone, Debug, Args)]
pub(crate) struct PolicyArgs {
    /// Restriction policy of the guests' rings: a file, or the name of a built-in policy. Default: direct-read-write,
    /// or direct-read-only for a disk that is opened read-only.
    #[arg(long, value_name = "POLICY")]
    policy: Option<String>,
    /// Accept a policy whose lint has errors. Guests can then escape, or exhaust the host.
    #[arg(long)]
    allow_unsafe_policy: bool,
}

impl PolicyArgs {
    /// Reads the policy.
    ///
    /// # Errors
    ///
    /// The policy cannot be read.
    pub(crate) fn read(&self) -> anyhow::Result<ChosenPolicy> {
        let policy = self.policy.as_deref().map(|name| read(name).map(|file| file.policy)).transpose()?;
        Ok(ChosenPolicy { policy, is_unsafe_accepted: self.allow_unsafe_policy })
    }
}

/// The policy of a program's rings.
#[derive(Clone, Copy, Debug)]
pub(crate) struct ChosenPolicy {
    /// `None`: the built-in policy for the disk.
    policy: Option<Policy>,
    is_unsafe_accepted: bool,
}

impl ChosenPolicy {
    /// Compiles the policy for a disk and this kernel.
    ///
    /// # Errors
    ///
    /// The kernel cannot enforce the policy.
    pub(crate) fn compile(&self, access: Access, kernel: &KernelSupport) -> Result<CompiledPolicy, CompileError> {
        let compiled = self.policy.unwrap_or_else(|| BuiltIn::Direct(access).policy()).compile(kernel)?;
        Ok(if self.is_unsafe_accepted { compiled.accept_unsafe() } else { compiled })
    }
}

/// Reads the built-in policy of that name, or else the file at that path.
pub(crate) fn read(name: &str) -> anyhow::Result<PolicyFile> {
    if let Some(built_in) = BuiltIn::from_name(name) {
        return PolicyFile::parse(built_in.file()).with_context(|| format!("the built-in policy {name}"));
    }
    let text = read_text(Path::new(name)).map_err(|error| {
        let names = BuiltIn::ALL.map(BuiltIn::name).join(", ");
        anyhow!("cannot read the policy file {name:?}: {error:#}. Built-in policies are {names}")
    })?;
    PolicyFile::parse(&text).with_context(|| name.to_owned())
}

/// Reads the text of a file or pipe, up to a limit: devices such as `/dev/zero` have no end.
fn read_text(path: &Path) -> anyhow::Result<String> {
    let mut text = Vec::new();
    File::open(path)?.take(FILE_BYTES_MAX + 1).read_to_end(&mut text)?;
    ensure!(
        text.len() as u64 <= FILE_BYTES_MAX,
        "it has more than {} KiB; no policy is that long",
        FILE_BYTES_MAX >> 10
    );
    String::from_utf8(text).map_err(|error| anyhow!("it is not UTF-8 text: {}", error.utf8_error()))
}
