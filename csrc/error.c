#include "error.h"

#include <stdarg.h>
#include <stdio.h>
#include <string.h>

static _Thread_local char text[512];

static const char *code_text(int code) {
  switch (code) {
#define X(name, value, words) \
  case value: return words;
    LINA_ERRORS(X)
#undef X
  }
  return "unknown error";
}

int lina_error(int code, const char *format, ...) {
  /* Built apart first: the arguments may point into `text`. */
  char detail[sizeof text];
  va_list args;
  va_start(args, format);
  vsnprintf(detail, sizeof detail, format, args);
  va_end(args);
  snprintf(text, sizeof text, "lina: %.380s (%s)", detail, code_text(code));
  return code;
}

const char *lina_error_text(void) { return text; }
