//! The functions that the compiler calls by name and that a C library would provide. They are a macro, so that a test
//! can assemble them under other names.

/// Assembles `memcpy`, `memmove`, `memset`, `memcmp` and `bcmp`, with `prefix` before each name.
///
/// For lengths of a block the string instructions are as fast as any code on processors with fast short REP MOVSB, and
/// the compiler inlines the workload's small copies.
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
            // The destination starts inside the source: copy from the end.
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
            // Zero bytes are equal.
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
