//! Counts the instructions that an emulated guest executes, for each block of its code: a plugin of QEMU's TCG.
//!
//! `qemu-system-x86_64 -plugin libringpass_instruction_count.so,socket=PATH`. Each connection to the socket gets what was
//! counted so far, a line for each block: its virtual address in hexadecimal digits, and the number of instructions executed in
//! it. QEMU counts a block as a whole, also if an exception ends it early.
//!
//! The counts are exact if one thread emulates all CPUs. QEMU's plugins are described in `docs/devel/tcg-plugins.rst` of QEMU.

use std::collections::HashMap;
use std::ffi::{CStr, c_char, c_int, c_uint, c_void};
use std::io::Write;
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{LazyLock, Mutex, PoisonError};
use std::{slice, thread};

/// The version of QEMU's interface for which this plugin is built. QEMU before 9.0 takes version 1, later ones take 2: what
/// this plugin uses is the same in both.
#[unsafe(no_mangle)]
#[allow(non_upper_case_globals, reason = "QEMU looks for this name")]
pub static qemu_plugin_version: c_int = match option_env!("RINGPASS_QEMU_PLUGIN_VERSION") {
    Some(version) => version.as_bytes()[0] as c_int - b'0' as c_int,
    None => 1,
};

/// `struct qemu_plugin_tb`: a block of guest code that QEMU has translated.
#[repr(C)]
pub struct TranslationBlock {
    opaque: [u8; 0],
}

/// `QEMU_PLUGIN_CB_NO_REGS`: a callback reads no registers.
const NO_REGISTERS: c_uint = 0;

unsafe extern "C" {
    safe fn qemu_plugin_register_vcpu_tb_trans_cb(id: u64, callback: extern "C" fn(u64, *mut TranslationBlock));
    fn qemu_plugin_register_vcpu_tb_exec_cb(
        block: *mut TranslationBlock,
        callback: extern "C" fn(c_uint, *mut c_void),
        flags: c_uint,
        data: *mut c_void,
    );
    fn qemu_plugin_tb_n_insns(block: *const TranslationBlock) -> usize;
    fn qemu_plugin_tb_vaddr(block: *const TranslationBlock) -> u64;
}

/// The blocks of guest code, by address and number of instructions. They live as long as QEMU.
static BLOCKS: LazyLock<Mutex<HashMap<(u64, u64), &'static AtomicU64>>> = LazyLock::new(Mutex::default);

/// QEMU loads the plugin.
///
/// # Safety
///
/// `arguments` are `count` strings.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qemu_plugin_install(
    id: u64,
    _info: *const c_void,
    count: c_int,
    arguments: *const *const c_char,
) -> c_int {
    let count = usize::try_from(count).unwrap_or(0);
    // SAFETY: QEMU gives so many strings, which live during this call; none are no slice.
    let arguments = if count == 0 { &[] } else { unsafe { slice::from_raw_parts(arguments, count) } };
    let mut path = None;
    for &argument in arguments {
        // SAFETY: each of them ends with a zero byte.
        let argument = unsafe { CStr::from_ptr(argument) };
        path = argument.to_str().ok().and_then(|argument| argument.strip_prefix("socket=")).map(str::to_owned).or(path);
    }
    let Some(path) = path else {
        eprintln!("the plugin that counts instructions needs socket=PATH");
        return 1;
    };
    match UnixListener::bind(&path) {
        Ok(listener) => {
            thread::spawn(move || listener.incoming().flatten().for_each(tell));
            qemu_plugin_register_vcpu_tb_trans_cb(id, translated);
            0
        }
        Err(error) => {
            eprintln!("the plugin that counts instructions cannot listen on {path}: {error}");
            1
        }
    }
}

/// Writes the counts of all blocks. A reader that has gone needs none.
fn tell(mut stream: UnixStream) {
    let mut text = String::new();
    {
        let blocks = BLOCKS.lock().unwrap_or_else(PoisonError::into_inner);
        for (&(address, instructions), executions) in &*blocks {
            let executed = instructions * executions.load(Ordering::Relaxed);
            if executed > 0 {
                text.push_str(&format!("{address:x} {executed}\n"));
            }
        }
    }
    let _ = stream.write_all(text.as_bytes());
}

extern "C" fn translated(_id: u64, block: *mut TranslationBlock) {
    // SAFETY: QEMU calls this with a block, which lives during the call.
    let instructions = unsafe { qemu_plugin_tb_n_insns(block) } as u64;
    // SAFETY: the same.
    let address = unsafe { qemu_plugin_tb_vaddr(block) };
    let executions = {
        let mut blocks = BLOCKS.lock().unwrap_or_else(PoisonError::into_inner);
        let executions: &'static AtomicU64 =
            blocks.entry((address, instructions)).or_insert_with(|| Box::leak(Box::new(AtomicU64::new(0))));
        executions
    };
    let data = (&raw const *executions).cast_mut().cast();
    // SAFETY: the same, and the counter lives for ever.
    unsafe { qemu_plugin_register_vcpu_tb_exec_cb(block, executed, NO_REGISTERS, data) };
}

extern "C" fn executed(_cpu: c_uint, data: *mut c_void) {
    // SAFETY: `translated` has given a counter that lives for ever.
    let executions = unsafe { &*data.cast_const().cast::<AtomicU64>() };
    executions.fetch_add(1, Ordering::Relaxed);
}
