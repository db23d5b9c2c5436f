//! Whether virtual machines can be made, and to which parts of KVM a guest's ring can be connected.

use std::io;

use nix::libc::{EACCES, ENOENT, EPERM};

use super::{Check, Status};
use crate::kvm::{KvmRefusal, KvmSupport};

/// All checks of KVM. No mode needs KVM: a guest can be a process, or run under another monitor.
pub(super) fn checks(kvm: &Result<KvmSupport, KvmRefusal>) -> Vec<Check> {
    let first = Check::ok("kvm", "KVM", "virtual machines can be made");
    let first = match kvm {
        Ok(_) => first,
        Err(refusal) => {
            let (why, change) = refused(refusal);
            first.missing(why, change)
        }
    };
    let kvm = kvm.as_ref().ok();
    let abilities = [
        ("kvm-irqfd", "irqfd", "a completion cannot interrupt a guest without the broker"),
        ("kvm-ioeventfd", "ioeventfd", "each doorbell waits for the monitor"),
        ("kvm-statistics", "exit statistics", "the demo cannot count VM exits (Linux 5.14)"),
        ("kvm-dirty-ring", "dirty ring", "live migration needs dirty bitmaps"),
    ];
    let has = kvm.map(|kvm| [kvm.irqfd, kvm.ioeventfd, kvm.statistics, kvm.dirty_ring_pages > 0]);
    let ability = |(index, (name, title, without))| match (kvm, has) {
        (Some(kvm), Some(has)) if has[index] => Check::ok(name, title, detail(name, kvm)),
        (Some(_), _) => Check::ok(name, title, "this KVM lacks it").missing(without, Vec::new()),
        (None, _) => Check::ok(name, title, "").with_status(Status::NotTried),
    };
    let mut checks = vec![first];
    checks.extend(abilities.into_iter().enumerate().map(ability));
    checks.push(speed(kvm));
    checks
}

fn detail(name: &str, kvm: &KvmSupport) -> String {
    match name {
        "kvm-dirty-ring" => format!("up to {} pages for each vCPU", kvm.dirty_ring_pages),
        _ => "works".to_owned(),
    }
}

fn refused(refusal: &KvmRefusal) -> (String, Vec<String>) {
    let KvmRefusal { step, errno } = *refusal;
    let (why, change) = match errno {
        ENOENT => (
            "there is no /dev/kvm: no KVM module is loaded, or this is a container without the device".to_owned(),
            "modprobe kvm_intel or kvm_amd; virtualization may be off in the firmware; inside a virtual machine the \
             host must allow nested virtualization; a container needs --device /dev/kvm",
        ),
        EACCES | EPERM => (
            "this user may not open /dev/kvm".to_owned(),
            "add the user to the group kvm (usermod -aG kvm USER) and log in again",
        ),
        _ => (
            format!("{step} failed: {}", io::Error::from_raw_os_error(errno)),
            "see the kernel log; another hypervisor may use the processor's virtualization",
        ),
    };
    (why, vec![change.to_owned()])
}

/// Whether the processor runs guest code itself.
fn speed(kvm: Option<&KvmSupport>) -> Check {
    let check = |detail: String| Check::ok("kvm-native", "guest code at native speed", detail);
    let Some((kvm, ps)) = kvm.and_then(|kvm| Some((kvm, kvm.kernel_ps_per_instruction?))) else {
        return check("the trial guest did not run".to_owned()).with_status(Status::NotTried);
    };
    let ns = ps as f64 / 1e3;
    if kvm.is_kernel_native() == Some(true) {
        check(format!("at all privilege levels ({ns:.2} ns per instruction at CPL 0)"))
    } else {
        let detail = format!(
            "CPL 3 only: this KVM runs CPL 0 in software ({ns:.0} ns per instruction), so that an ordinary guest kernel \
             is slow; the bare-metal guest of the demo is not"
        );
        check(detail).with_status(Status::Information)
    }
}
