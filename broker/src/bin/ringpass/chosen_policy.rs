//! The policy of a program's rings, from its command line.

use std::fs::File;
use std::io::Read;
use std::path::Path;

use anyhow::{Context, anyhow, ensure};
use clap::Args;
use ringpass_restrictions::{Access, BuiltIn, CompileError, CompiledPolicy, KernelSupport, Policy, PolicyFile};

/// Far more than all operations and flags with their names take.
const FILE_BYTES_MAX: u64 = 256 << 10;

/// Which policy the rings of a program get.
#[derive(Clone, Debug, Args)]
pub(crate) struct PolicyArgs {
    /// The restriction policy of the guests' rings: a file, or the name of a built-in one. Default: direct-read-write, or
    /// direct-read-only for a disk that is opened read-only.
    #[arg(long, value_name = "POLICY")]
    policy: Option<String>,
    /// Take the policy although its lint has errors: guests can then get out, or exhaust the host.
    #[arg(long)]
    allow_unsafe_policy: bool,
}

impl PolicyArgs {
    /// Reads the policy.
    ///
    /// # Errors
    ///
    /// It cannot be read.
    pub(crate) fn read(&self) -> anyhow::Result<ChosenPolicy> {
        let policy = self.policy.as_deref().map(|name| read(name).map(|file| file.policy)).transpose()?;
        Ok(ChosenPolicy { policy, is_unsafe_accepted: self.allow_unsafe_policy })
    }
}

/// The policy of a program's rings.
#[derive(Clone, Copy, Debug)]
pub(crate) struct ChosenPolicy {
    /// None: the built-in one for the disk.
    policy: Option<Policy>,
    is_unsafe_accepted: bool,
}

impl ChosenPolicy {
    /// The policy for a disk, compiled for this kernel.
    ///
    /// # Errors
    ///
    /// The kernel cannot enforce it.
    pub(crate) fn compile(&self, access: Access, kernel: &KernelSupport) -> Result<CompiledPolicy, CompileError> {
        let compiled = self.policy.unwrap_or_else(|| BuiltIn::Direct(access).policy()).compile(kernel)?;
        Ok(if self.is_unsafe_accepted { compiled.accept_unsafe() } else { compiled })
    }
}

/// The built-in policy of that name, or the file.
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

/// The text of a file or pipe, which has an end: devices such as `/dev/zero` have none.
fn read_text(path: &Path) -> anyhow::Result<String> {
    let mut text = Vec::new();
    File::open(path)?.take(FILE_BYTES_MAX + 1).read_to_end(&mut text)?;
    ensure!(text.len() as u64 <= FILE_BYTES_MAX, "it has more than {} KiB, which no policy has", FILE_BYTES_MAX >> 10);
    String::from_utf8(text).map_err(|error| anyhow!("it is no text in UTF-8: {}", error.utf8_error()))
}
