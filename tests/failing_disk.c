/* Loaded before the C library: the first DISK_FAILURES opens (or reads, DISK_CALL=read) of files whose path contains
 * DISK_PATTERN fail with the error number DISK_ERRNO, as a network file system in trouble would make them. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/uio.h>
#include <unistd.h>

static atomic_int failed;

static int fails(const char *path, const char *call) {
    const char *pattern = getenv("DISK_PATTERN"), *wanted = getenv("DISK_CALL");
    if (!pattern || !path || !strstr(path, pattern) || strcmp(wanted ? wanted : "open", call)) return 0;
    if (atomic_fetch_add(&failed, 1) >= atoi(getenv("DISK_FAILURES"))) return 0;
    errno = atoi(getenv("DISK_ERRNO"));
    return 1;
}

#define OPEN(name)                                                      \
    int name(const char *path, int flags, ...) {                        \
        static int (*next)(const char *, int, ...);                     \
        va_list rest;                                                   \
        va_start(rest, flags);                                          \
        int mode = flags & (O_CREAT | __O_TMPFILE) ? va_arg(rest, int) : 0; \
        va_end(rest);                                                   \
        if (!next) next = dlsym(RTLD_NEXT, #name);                      \
        return fails(path, "open") ? -1 : next(path, flags, mode);      \
    }
OPEN(open)
OPEN(open64)

static int reading_fails(int file) {
    char link[64], path[4096];
    snprintf(link, sizeof link, "/proc/self/fd/%d", file);
    ssize_t length = readlink(link, path, sizeof path - 1);
    path[length < 0 ? 0 : length] = 0;
    return fails(path, "read");
}

#define READ(name, parameters, arguments)                         \
    ssize_t name parameters {                                     \
        static ssize_t(*next) parameters;                         \
        if (!next) next = dlsym(RTLD_NEXT, #name);                \
        return reading_fails(file) ? -1 : next arguments;         \
    }
READ(preadv, (int file, const struct iovec *parts, int count, off_t offset), (file, parts, count, offset))
READ(preadv64, (int file, const struct iovec *parts, int count, off64_t offset), (file, parts, count, offset))
READ(preadv2, (int file, const struct iovec *parts, int count, off_t offset, int flags), (file, parts, count, offset, flags))
READ(preadv64v2, (int file, const struct iovec *parts, int count, off64_t offset, int flags), (file, parts, count, offset, flags))
READ(pread, (int file, void *buffer, size_t size, off_t offset), (file, buffer, size, offset))
READ(pread64, (int file, void *buffer, size_t size, off64_t offset), (file, buffer, size, offset))
