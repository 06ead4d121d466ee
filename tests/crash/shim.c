/* LD_PRELOAD shim: stands between a program and the C library's calls that change a disk.

   After shim_arm, every such call on a path below `prefix` is counted. The one whose number is fault_at is struck:
     KILL  the process is killed by SIGKILL before the call
     TEAR  (counts writes only) half of the write goes through, then the process is killed
     FAIL  the call returns -1 with errno `error`, once; later calls work again
   Every call that succeeds is appended to a log, in the order in which they took effect: calls of all threads go one at
   a time. From the log tests/crash/disk_model.py works out what a power cut would leave. A record is the struct below,
   then the path, the second path, the data. */

#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/sendfile.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

enum { KILL = 1, TEAR = 2, FAIL = 3 };

struct record {
    char op;               /* C create  W write  S sync  R rename  U unlink  M mkdir  D rmdir  T truncate  L link
                              Y symlink  A mark  ? a way to change files that this shim does not know */
    char pad[3];
    uint32_t pid, path_len, path2_len;
    int64_t number;        /* offset of a write, length of a truncate, number of a mark */
    uint64_t data_len;
} __attribute__((packed));

static pthread_mutex_t turn = PTHREAD_MUTEX_INITIALIZER;
static char prefix[PATH_MAX];
static size_t prefix_len;
static int armed, mode, fault_errno, log_fd = -1;
static long fault_at, calls;

void shim_arm(const char *where, const char *log, long number, int how, int error)
{
    snprintf(prefix, sizeof prefix, "%s", where);
    prefix_len = strlen(prefix);
    log_fd = syscall(SYS_openat, AT_FDCWD, log, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0644);
    if (log_fd < 0) abort();
    fault_at = number, mode = how, fault_errno = error, calls = 0, armed = 1;
}

void shim_disarm(void) { armed = 0; }
long shim_calls(void) { return calls; }

static void die(void) { syscall(SYS_kill, getpid(), SIGKILL); for (;;) pause(); }

static void note(char op, const char *path, const char *path2, int64_t number, const struct iovec *pieces, uint64_t len)
{
    struct record r = {.op = op, .pid = getpid(), .number = number, .data_len = len};
    r.path_len = strlen(path), r.path2_len = path2 ? strlen(path2) : 0;
    size_t size = sizeof r + r.path_len + r.path2_len + len, at = 0;
    char *all = malloc(size);
    if (!all) abort();
    memcpy(all, &r, sizeof r), at = sizeof r;
    memcpy(all + at, path, r.path_len), at += r.path_len;
    if (path2) memcpy(all + at, path2, r.path2_len), at += r.path2_len;
    for (; len; pieces++) {
        size_t part = pieces->iov_len < len ? pieces->iov_len : len;
        memcpy(all + at, pieces->iov_base, part), at += part, len -= part;
    }
    if (syscall(SYS_write, log_fd, all, size) != (ssize_t)size) abort();
    free(all);
}

/* The absolute path that (folder, name) means; 1 if it is below the prefix. */
static int placed(char *out, int folder, const char *name)
{
    if (!armed) return 0;
    char base[PATH_MAX] = "", link[64];
    if (name && name[0] == '/') snprintf(out, PATH_MAX, "%s", name);
    else {
        if (folder == AT_FDCWD) { if (!getcwd(base, sizeof base)) return 0; }
        else {
            snprintf(link, sizeof link, "/proc/self/fd/%d", folder);
            ssize_t n = readlink(link, base, sizeof base - 1);
            if (n < 0) return 0;
            base[n] = 0;
        }
        if (!name || !*name) snprintf(out, PATH_MAX, "%s", base);
        else if (snprintf(out, PATH_MAX, "%s/%s", base, name) >= PATH_MAX) abort();
    }
    return !strncmp(out, prefix, prefix_len) && (out[prefix_len] == '/' || !out[prefix_len]);
}

/* Count a call and strike it if it is its turn; 1 = it has to fail. Returns with the turn taken. */
static int struck(int is_write)
{
    pthread_mutex_lock(&turn);
    if (mode != TEAR || is_write) calls++;
    if (calls != fault_at || !armed) return 0;
    if (mode == KILL) die();
    if (mode == FAIL) { fault_at = 0; errno = fault_errno; pthread_mutex_unlock(&turn); return 1; }
    return 0;
}

static void done(void) { int e = errno; pthread_mutex_unlock(&turn); errno = e; }

static ssize_t forward(int fd, const struct iovec *pieces, int count, off_t at)
{
    return at < 0 ? syscall(SYS_writev, fd, pieces, count) : syscall(SYS_pwritev, fd, pieces, count, at, 0);
}

/* All kinds of writes; at < 0: at the file's own place. */
static ssize_t put(int fd, const struct iovec *pieces, int count, off_t at)
{
    char path[PATH_MAX];
    if (!placed(path, fd, NULL)) return forward(fd, pieces, count, at);
    if (struck(1)) return -1;
    int flags = fcntl(fd, F_GETFL);
    struct stat st;
    fstat(fd, &st);
    off_t start = flags & O_APPEND ? st.st_size : at < 0 ? lseek(fd, 0, SEEK_CUR) : at;
    if (mode == TEAR && calls == fault_at) {
        size_t all = 0;
        for (int i = 0; i < count; i++) all += pieces[i].iov_len;
        fcntl(fd, F_SETFL, flags & ~O_DIRECT);
        for (size_t left = all / 2, i = 0; left; i++) {
            size_t part = pieces[i].iov_len < left ? pieces[i].iov_len : left;
            if (syscall(SYS_pwrite64, fd, pieces[i].iov_base, part, start) != (ssize_t)part) abort();
            struct iovec one = {pieces[i].iov_base, part};
            note('W', path, NULL, start, &one, part);
            start += part, left -= part;
        }
        die();
    }
    ssize_t n = forward(fd, pieces, count, at);
    if (n > 0) note('W', path, NULL, start, pieces, n);
    done();
    return n;
}

ssize_t write(int fd, const void *data, size_t len)
{
    if (!armed || fd == log_fd) return syscall(SYS_write, fd, data, len);
    struct iovec one = {(void *)data, len};
    char path[PATH_MAX];
    return placed(path, fd, NULL) ? put(fd, &one, 1, -1) : syscall(SYS_write, fd, data, len);
}
ssize_t writev(int fd, const struct iovec *v, int n) { return put(fd, v, n, -1); }
ssize_t pwrite(int fd, const void *data, size_t len, off_t at)
{
    struct iovec one = {(void *)data, len};
    return put(fd, &one, 1, at);
}
ssize_t pwrite64(int fd, const void *data, size_t len, off64_t at) { return pwrite(fd, data, len, at); }
ssize_t pwritev(int fd, const struct iovec *v, int n, off_t at) { return put(fd, v, n, at); }
ssize_t pwritev64(int fd, const struct iovec *v, int n, off64_t at) { return put(fd, v, n, at); }

/* A call that changes names or lengths, or syncs: count, strike, call, note. */
#define CHANGE(op, path, path2, number, call) \
    do { \
        if (struck(0)) return -1; \
        int result = (call); \
        if (result >= 0) note(op, path, path2, number, NULL, 0); \
        done(); \
        return result; \
    } while (0)

static int make(int folder, const char *name, int flags, mode_t perm)
{
    char path[PATH_MAX];
    struct stat st;
    if (!(flags & (O_CREAT | O_TRUNC)) || !placed(path, folder, name))
        return syscall(SYS_openat, folder, name, flags, perm);
    if (!(flags & O_TRUNC) && !(flags & O_EXCL) && !lstat(path, &st))
        return syscall(SYS_openat, folder, name, flags, perm); /* it is there: nothing changes */
    CHANGE('C', path, NULL, !!(flags & O_TRUNC), syscall(SYS_openat, folder, name, flags, perm));
}

#define PERM(flags) \
    mode_t perm = 0; \
    if ((flags) & (O_CREAT | __O_TMPFILE)) { va_list rest; va_start(rest, flags); perm = va_arg(rest, mode_t); va_end(rest); }

int open(const char *p, int flags, ...) { PERM(flags) return make(AT_FDCWD, p, flags, perm); }
int open64(const char *p, int flags, ...) { PERM(flags) return make(AT_FDCWD, p, flags, perm); }
int openat(int d, const char *p, int flags, ...) { PERM(flags) return make(d, p, flags, perm); }
int openat64(int d, const char *p, int flags, ...) { PERM(flags) return make(d, p, flags, perm); }
int creat(const char *p, mode_t perm) { return make(AT_FDCWD, p, O_CREAT | O_WRONLY | O_TRUNC, perm); }
int creat64(const char *p, mode_t perm) { return creat(p, perm); }

static int flush(int fd, long number)
{
    char path[PATH_MAX];
    if (!placed(path, fd, NULL)) return syscall(number, fd);
    CHANGE('S', path, NULL, 0, syscall(number, fd));
}
int fsync(int fd) { return flush(fd, SYS_fsync); }
int fdatasync(int fd) { return flush(fd, SYS_fdatasync); }

static int move(int d1, const char *p1, int d2, const char *p2, unsigned flags)
{
    char a[PATH_MAX], b[PATH_MAX];
    int one = placed(a, d1, p1), two = placed(b, d2, p2);
    if (!one && !two) return syscall(SYS_renameat2, d1, p1, d2, p2, flags);
    CHANGE('R', a, b, flags, syscall(SYS_renameat2, d1, p1, d2, p2, flags));
}
int rename(const char *a, const char *b) { return move(AT_FDCWD, a, AT_FDCWD, b, 0); }
int renameat(int d1, const char *a, int d2, const char *b) { return move(d1, a, d2, b, 0); }
int renameat2(int d1, const char *a, int d2, const char *b, unsigned flags) { return move(d1, a, d2, b, flags); }

int unlinkat(int d, const char *p, int flags)
{
    char path[PATH_MAX];
    if (!placed(path, d, p)) return syscall(SYS_unlinkat, d, p, flags);
    CHANGE(flags & AT_REMOVEDIR ? 'D' : 'U', path, NULL, 0, syscall(SYS_unlinkat, d, p, flags));
}
int unlink(const char *p) { return unlinkat(AT_FDCWD, p, 0); }
int rmdir(const char *p) { return unlinkat(AT_FDCWD, p, AT_REMOVEDIR); }
int remove(const char *p)
{
    struct stat st;
    return lstat(p, &st) ? -1 : S_ISDIR(st.st_mode) ? rmdir(p) : unlink(p);
}

int mkdirat(int d, const char *p, mode_t perm)
{
    char path[PATH_MAX];
    if (!placed(path, d, p)) return syscall(SYS_mkdirat, d, p, perm);
    CHANGE('M', path, NULL, 0, syscall(SYS_mkdirat, d, p, perm));
}
int mkdir(const char *p, mode_t perm) { return mkdirat(AT_FDCWD, p, perm); }

int ftruncate(int fd, off_t len)
{
    char path[PATH_MAX];
    if (!placed(path, fd, NULL)) return syscall(SYS_ftruncate, fd, len);
    CHANGE('T', path, NULL, len, syscall(SYS_ftruncate, fd, len));
}
int ftruncate64(int fd, off64_t len) { return ftruncate(fd, len); }
int truncate(const char *p, off_t len)
{
    char path[PATH_MAX];
    if (!placed(path, AT_FDCWD, p)) return syscall(SYS_truncate, p, len);
    CHANGE('T', path, NULL, len, syscall(SYS_truncate, p, len));
}
int truncate64(const char *p, off64_t len) { return truncate(p, len); }

int linkat(int d1, const char *p1, int d2, const char *p2, int flags)
{
    char a[PATH_MAX], b[PATH_MAX];
    placed(a, d1, p1);
    if (!placed(b, d2, p2)) return syscall(SYS_linkat, d1, p1, d2, p2, flags);
    CHANGE('L', a, b, 0, syscall(SYS_linkat, d1, p1, d2, p2, flags));
}
int link(const char *a, const char *b) { return linkat(AT_FDCWD, a, AT_FDCWD, b, 0); }
int symlinkat(const char *to, int d, const char *p)
{
    char path[PATH_MAX];
    if (!placed(path, d, p)) return syscall(SYS_symlinkat, to, d, p);
    CHANGE('Y', to, path, 0, syscall(SYS_symlinkat, to, d, p));
}
int symlink(const char *to, const char *p) { return symlinkat(to, AT_FDCWD, p); }

/* Not a change: something that the test wants to find between the changes. */
void shim_mark(long number)
{
    pthread_mutex_lock(&turn);
    if (armed) note('A', prefix, NULL, number, NULL, 0);
    pthread_mutex_unlock(&turn);
}

/* Other ways to change a file: the model knows nothing of them, and says so. */
#define UNKNOWN(fd) \
    char path[PATH_MAX]; \
    if (placed(path, fd, NULL)) { pthread_mutex_lock(&turn); note('?', path, NULL, 0, NULL, 0); pthread_mutex_unlock(&turn); }

ssize_t sendfile(int out, int in, off_t *at, size_t n) { UNKNOWN(out) return syscall(SYS_sendfile, out, in, at, n); }
ssize_t sendfile64(int out, int in, off64_t *at, size_t n) { return sendfile(out, in, at, n); }
ssize_t copy_file_range(int in, off64_t *a, int out, off64_t *b, size_t n, unsigned flags)
{
    UNKNOWN(out)
    return syscall(SYS_copy_file_range, in, a, out, b, n, flags);
}
int fallocate(int fd, int how, off_t at, off_t len) { UNKNOWN(fd) return syscall(SYS_fallocate, fd, how, at, len); }
int fallocate64(int fd, int how, off64_t at, off64_t len) { return fallocate(fd, how, at, len); }
int posix_fallocate(int fd, off_t at, off_t len) { return fallocate(fd, 0, at, len) ? errno : 0; }
int posix_fallocate64(int fd, off64_t at, off64_t len) { return posix_fallocate(fd, at, len); }
void *mmap(void *addr, size_t len, int prot, int flags, int fd, off_t at)
{
    if (fd >= 0 && (flags & 0x0f) != MAP_PRIVATE && (prot & PROT_WRITE)) { UNKNOWN(fd) }
    return (void *)syscall(SYS_mmap, addr, len, prot, flags, fd, at);
}
void *mmap64(void *addr, size_t len, int prot, int flags, int fd, off64_t at) { return mmap(addr, len, prot, flags, fd, at); }
