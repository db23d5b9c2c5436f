//! `ringpass policy`: reports what a restriction policy lets a guest do.

use std::{
    io::{self, Write},
    process::ExitCode,
};

use anyhow::Context;
use clap::{Args, Subcommand, ValueEnum};
use ringpass_broker::kernel::{self, KernelRelease};
use ringpass_broker::printable::printable;
use ringpass_restrictions::{
    BuiltIn, CompileError, Finding, KernelSupport, LintContext, LinuxVersion, Mode, NopHole, Policy, PolicyFile,
    RestrictionSemantics, Severity,
};
use serde_json::json;

use crate::chosen_policy::read;
use crate::log;

/// Exit status of `lint` if there are errors, and of `diff` if there are differences.
const FOUND: u8 = 1;
/// Exit status if a policy cannot be read. (A wrong command line has the same status.)
const TROUBLE: u8 = 2;

/// Report what a restriction policy lets a guest do.
///
/// POLICY is a TOML file, or the name of a built-in policy: direct-read-write, direct-read-only, mediated-read-write,
/// mediated-read-only. The exit status is 2 if a policy cannot be read.
#[derive(Debug, Args)]
pub(crate) struct PolicyCommand {
    #[command(subcommand)]
    action: Action,
}

#[derive(Debug, Subcommand)]
enum Action {
    /// Report each way in which a policy would let a guest escape, exhaust the host or hang its own ring.
    ///
    /// The exit status is 0 without errors (there may be warnings and notes), 1 with errors. An error that the policy
    /// accepts (`accept` in the table `lint` of the file) is a warning.
    Lint(LintArgs),
    /// Describe in words what a guest can do.
    Show(ShowArgs),
    /// Print what only policy B allows (+), what only policy A allows (-), and what differs otherwise (~).
    ///
    /// The exit status is 0 if the policies do not differ, 1 if they do.
    Diff(DiffArgs),
    /// Print the names of the built-in policies.
    List,
}

#[derive(Debug, Args)]
struct LintArgs {
    /// The policy: a file, or the name of a built-in policy.
    policy: String,
    /// What executes the guest's SQEs. Default: mediated if the policy has field rules, otherwise direct.
    #[arg(long, value_enum)]
    mode: Option<ModeName>,
    /// The kernel to check the policy for: a release such as 6.12 or 6.18.44, or `running`. Default: any kernel.
    #[arg(long, value_name = "RELEASE")]
    kernel: Option<String>,
    /// Treat warnings as errors, and with them the errors that the policy accepts.
    #[arg(long)]
    strict: bool,
    /// Print one JSON object.
    #[arg(long)]
    json: bool,
}

#[derive(Debug, Args)]
struct ShowArgs {
    /// The policy: a file, or the name of a built-in policy.
    policy: String,
    /// Print one JSON object.
    #[arg(long, conflicts_with = "toml")]
    json: bool,
    /// Print the policy as a TOML file, as a start for your own policy.
    #[arg(long)]
    toml: bool,
}

#[derive(Debug, Args)]
struct DiffArgs {
    /// The old policy: a file, or the name of a built-in policy.
    a: String,
    /// The new policy: a file, or the name of a built-in policy.
    b: String,
    /// Print one JSON object.
    #[arg(long)]
    json: bool,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum ModeName {
    Direct,
    Mediated,
}

impl From<ModeName> for Mode {
    fn from(name: ModeName) -> Self {
        match name {
            ModeName::Direct => Self::Direct,
            ModeName::Mediated => Self::Mediated,
        }
    }
}

/// Runs `ringpass policy`.
///
/// # Errors
///
/// The output cannot be written. (If a policy cannot be read, this function prints the error and returns its exit
/// status.)
pub(crate) fn run(command: &PolicyCommand) -> anyhow::Result<ExitCode> {
    let mut out = Vec::new();
    let status = match &command.action {
        Action::Lint(args) => lint(args, &mut out),
        Action::Show(args) => show(args, &mut out),
        Action::Diff(args) => diff(args, &mut out),
        Action::List => list(&mut out),
    };
    let status = status.unwrap_or_else(|error| {
        log::tell("ringpass", &error);
        TROUBLE
    });
    match io::stdout().write_all(&out) {
        // The reader has closed the pipe and wants no more output.
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => {}
        written => written.context("cannot write the report")?,
    }
    Ok(ExitCode::from(status))
}

/// The kernel to check a policy for.
struct Kernel {
    support: KernelSupport,
    semantics: RestrictionSemantics,
    nop: NopHole,
}

fn kernel_named(name: &str) -> anyhow::Result<Kernel> {
    if name == "running" {
        let support = kernel::support().context("cannot ask the kernel what its io_uring can do")?;
        let context = kernel::lint_context(Mode::Direct, support.semantics);
        return Ok(Kernel { support, semantics: support.semantics, nop: context.nop });
    }
    let release = KernelRelease::parse(name, "", None)
        .with_context(|| format!("{name:?} is no kernel release: give one such as 6.12 or 6.18.44, or `running`"))?;
    let upstream = release.upstream();
    let part = |number: u16| u8::try_from(number).unwrap_or(u8::MAX);
    let version = LinuxVersion { major: part(upstream.major), minor: part(upstream.minor) };
    let support = KernelSupport::upstream(version);
    Ok(Kernel { support, semantics: support.semantics, nop: kernel::nop_hole(&release) })
}

fn lint(args: &LintArgs, out: &mut Vec<u8>) -> anyhow::Result<u8> {
    let policy = read(&args.policy)?.policy;
    let kernel = args.kernel.as_deref().map(kernel_named).transpose()?;
    let any = LintContext::for_any_kernel(&policy);
    let mode = args.mode.map_or(any.mode, Mode::from);
    let context = match &kernel {
        Some(kernel) => LintContext::new(mode, Some(kernel.semantics)).nop(kernel.nop),
        None => LintContext::new(mode, None),
    };
    let findings = policy.lint(&context);
    let refusal = match (&kernel, context.mode) {
        (Some(kernel), Mode::Direct) => policy.compile(&kernel.support).err(),
        _ => None,
    };
    let threshold = if args.strict { Severity::Warning } else { Severity::Error };
    let is_bad = refusal.is_some() || findings.iter().any(|finding| finding.severity >= threshold);
    if args.json {
        write_lint_json(out, args, context.mode, &findings, refusal.as_ref())?;
    } else {
        write_lint(out, args, context.mode, &findings, refusal.as_ref())?;
    }
    Ok(if is_bad { FOUND } else { 0 })
}

const fn mode_name(mode: Mode) -> &'static str {
    match mode {
        Mode::Direct => "direct",
        Mode::Mediated => "mediated",
    }
}

fn count(findings: &[Finding], severity: Severity) -> usize {
    findings.iter().filter(|finding| finding.severity == severity).count()
}

fn write_lint(
    out: &mut Vec<u8>,
    args: &LintArgs,
    mode: Mode,
    findings: &[Finding],
    refusal: Option<&CompileError>,
) -> io::Result<()> {
    for (index, finding) in findings.iter().enumerate() {
        writeln!(out, "{finding}")?;
        // The reason once for each kind of finding.
        if findings[..index].iter().all(|earlier| earlier.lint != finding.lint) {
            writeln!(out, "    {}", finding.lint.why())?;
        }
    }
    if let Some(refusal) = refusal {
        writeln!(out, "error: kernel {}: {refusal}", args.kernel.as_deref().unwrap_or_default())?;
    }
    writeln!(
        out,
        "{} for {} mode on {}: {} errors, {} warnings, {} notes",
        printable(&args.policy),
        mode_name(mode),
        args.kernel.as_deref().map_or("any kernel".to_owned(), |kernel| format!("kernel {kernel}")),
        count(findings, Severity::Error) + usize::from(refusal.is_some()),
        count(findings, Severity::Warning),
        count(findings, Severity::Note),
    )
}

fn write_lint_json(
    out: &mut Vec<u8>,
    args: &LintArgs,
    mode: Mode,
    findings: &[Finding],
    refusal: Option<&CompileError>,
) -> anyhow::Result<()> {
    let each = |finding: &Finding| {
        json!({
            "lint": finding.lint.name(),
            "severity": finding.severity.name(),
            "accepted": finding.is_accepted,
            "subject": finding.subject,
            "what": finding.what,
            "why": finding.lint.why(),
        })
    };
    write_json(
        out,
        &json!({
            "policy": args.policy,
            "mode": mode_name(mode),
            "kernel": args.kernel,
            "compile_error": refusal.map(ToString::to_string),
            "errors": count(findings, Severity::Error),
            "warnings": count(findings, Severity::Warning),
            "notes": count(findings, Severity::Note),
            "findings": findings.iter().map(each).collect::<Vec<_>>(),
        }),
    )
}

fn show(args: &ShowArgs, out: &mut Vec<u8>) -> anyhow::Result<u8> {
    let file = read(&args.policy)?;
    if args.toml {
        match BuiltIn::from_name(&args.policy) {
            Some(built_in) => out.extend_from_slice(built_in.file().as_bytes()),
            None => out.extend_from_slice(file.to_toml().as_bytes()),
        }
        return Ok(0);
    }
    let policy = &file.policy;
    if args.json {
        write_json(out, &policy_json(&args.policy, &file, policy))?;
        return Ok(0);
    }
    let name = printable(file.name.as_deref().unwrap_or(&args.policy));
    let description = file.description.as_deref().map(|text| format!(": {}", printable(text))).unwrap_or_default();
    writeln!(out, "{name}{description}\n\n{}", policy.describe())?;
    Ok(0)
}

fn policy_json(shown: &str, file: &PolicyFile, policy: &Policy) -> serde_json::Value {
    let allowed = policy.operations();
    let operations = allowed.iter().map(|operation| {
        let facts = operation.facts();
        json!({
            "operation": operation.to_string(),
            "does": facts.map(|facts| facts.does),
            "reaches": facts.map(|facts| facts.reach.iter().map(|reach| reach.description()).collect::<Vec<_>>()),
            "ends": facts.map(|facts| facts.ends.description()),
            "source": facts.map(|facts| facts.source),
        })
    });
    json!({
        "policy": shown,
        "name": file.name,
        "description": file.description,
        "operations": operations.collect::<Vec<_>>(),
        "flags_required": policy.flags_required().to_string(),
        "flags_allowed": policy.flags_allowed().to_string(),
        "register_operations": policy.register_operations().iter().map(|o| o.to_string()).collect::<Vec<_>>(),
        "register_operations_if_known":
            policy.register_operations_if_known().iter().map(|o| o.to_string()).collect::<Vec<_>>(),
        "accepted": policy.accepted().names().collect::<Vec<_>>(),
        "field_rules": policy.fields().rules().map(|rule| rule.name()).collect::<Vec<_>>(),
        "text": policy.describe(),
    })
}

fn diff(args: &DiffArgs, out: &mut Vec<u8>) -> anyhow::Result<u8> {
    let differences = read(&args.a)?.policy.differences(&read(&args.b)?.policy);
    if args.json {
        let each = differences.iter().map(|one| json!({ "effect": one.effect(), "what": one.what() }));
        let differences = each.collect::<Vec<_>>();
        write_json(out, &json!({ "a": args.a, "b": args.b, "differences": differences }))?;
    } else {
        for difference in &differences {
            writeln!(out, "{difference}")?;
        }
    }
    Ok(if differences.is_empty() { 0 } else { FOUND })
}

fn list(out: &mut Vec<u8>) -> anyhow::Result<u8> {
    for built_in in BuiltIn::ALL {
        let description = read(built_in.name())?.description.unwrap_or_default();
        writeln!(out, "{:<22}{description}", built_in.name())?;
    }
    Ok(0)
}

fn write_json(out: &mut Vec<u8>, value: &serde_json::Value) -> anyhow::Result<()> {
    serde_json::to_writer_pretty(&mut *out, value)?;
    writeln!(out)?;
    Ok(())
}
