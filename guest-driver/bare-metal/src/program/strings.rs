//! What the compiler calls by name and a C library would bring, as a macro: a test assembles it under other names.

/// Assembles `memcpy`, `memmove`, `memset`, `memcmp` and `bcmp`, each name behind `prefix`.
///
/// The string instructions are as fast as anything for block-sized lengths on processors with fast short REP MOVSB, and
/// the workload's small copies are inlined.
macro_rules! string_functions {
    ($prefix:literal) => {
        core::arch::global_asm!(
            concat!(".globl ", $prefix, "memcpy"),
            concat!(".globl ", $prefix, "memmove"),
            concat!(".globl ", $prefix, "memset"),
            concat!(".globl ", $prefix, "memcmp"),
            concat!(".globl ", $prefix, "bcmp"),
            concat!($prefix, "memcpy:"),
            "    mov rax, rdi",
            "    mov rcx, rdx",
            "    rep movsb",
            "    ret",
            "",
            concat!($prefix, "memmove:"),
            "    mov rax, rdi",
            "    mov rcx, rdx",
            "    mov r8, rdi",
            "    sub r8, rsi",
            "    cmp r8, rdx",
            "    jb 3f",
            "    rep movsb",
            "    ret",
            // The destination starts inside the source: from the end.
            "3:  lea rsi, [rsi + rdx - 1]",
            "    lea rdi, [rdi + rdx - 1]",
            "    std",
            "    rep movsb",
            "    cld",
            "    ret",
            "",
            concat!($prefix, "memset:"),
            "    mov r8, rdi",
            "    mov eax, esi",
            "    mov rcx, rdx",
            "    rep stosb",
            "    mov rax, r8",
            "    ret",
            "",
            concat!($prefix, "memcmp:"),
            concat!($prefix, "bcmp:"),
            "    xor eax, eax",
            "    mov rcx, rdx",
            // Equal if there is nothing to compare.
            "    cmp ecx, ecx",
            "    repe cmpsb",
            "    je 4f",
            "    movzx eax, byte ptr [rdi - 1]",
            "    movzx ecx, byte ptr [rsi - 1]",
            "    sub eax, ecx",
            "4:  ret",
        );
    };
}
