/* A boot sector that reads and writes its disk through the firmware (INT 13h, IBM/MS extensions).
 *
 * The sectors behind it, from sector 1 on, are filled with 16-bit words that have the number of the sector. They are
 * read with one request, compared, and written behind themselves with another. The outcome goes to the first serial
 * port. The firmware loads this to 0:7c00 with the number of the disk in %dl.
 */
    .set SECTORS, 64
    .set BUFFER_SEGMENT, 0x1000

    .code16
    .globl _start
_start:
    ljmp    $0, $set_up
set_up:
    xorw    %ax, %ax
    movw    %ax, %ds
    movw    %ax, %ss
    movw    $0x7c00, %sp
    cld

    movw    $packet, %si
    movb    $0x42, %ah              /* read */
    int     $0x13
    movw    $read_failed, %si
    jc      print

    movw    $BUFFER_SEGMENT, %ax
    movw    %ax, %es
    xorw    %di, %di
    movw    $1, %ax
    movw    $wrong_data, %si
compare:
    movw    $256, %cx
    repe scasw
    jne     print
    incw    %ax
    cmpw    $SECTORS, %ax
    jbe     compare

    movw    $SECTORS + 1, packet_sector
    movw    $packet, %si
    movw    $0x4300, %ax            /* write, without verification */
    int     $0x13
    movw    $write_failed, %si
    jc      print
    movw    $all_well, %si

print:
    lodsb
    testb   %al, %al
    jz      halt
    movw    $0x3f8, %dx
    outb    %al, %dx
    jmp     print
halt:
    hlt
    jmp     halt

packet:                             /* disk address packet */
    .byte   16, 0
    .word   SECTORS
    .word   0, BUFFER_SEGMENT
packet_sector:
    .quad   1

read_failed:    .asciz "boot sector: the read failed\n"
wrong_data:     .asciz "boot sector: the data is wrong\n"
write_failed:   .asciz "boot sector: the write failed\n"
all_well:       .asciz "boot sector: all is well\n"

    .org    510
    .word   0xaa55
