/* Errors as values. */
#ifndef QGENX_FAILURE_H
#define QGENX_FAILURE_H

#include <cstdarg>
#include <cstdio>

#include "qgenx.h"

namespace qgenx {

/* What has gone wrong: a status, and a sentence for the caller, unless `message` is NULL. */
struct Failure {
    int status;
    char *message;

    int set(int why, const char *format, ...) {
        va_list arguments;
        va_start(arguments, format);
        if (message) vsnprintf(message, QGENX_MESSAGE, format, arguments);
        va_end(arguments);
        return status = why;
    }
};

}  // namespace qgenx

#endif
