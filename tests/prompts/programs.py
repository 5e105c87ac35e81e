"""Short programs, one in each language that code is read in."""

PYTHON = '''\
import os

def first(a):
    """Says nothing."""
    # why
    if a:
        b = 1; c = 2
    else:
        d(
            3
        )
    return a


class Second:
    x = 1

    def third(self): return 4
'''

PROGRAMS = {
    "python": PYTHON
    + """\
match x:
    case 1:
        y()
    case _:
        pass

@d
def f():
    try:
        a
    except E:
        b
    finally:
        c
""",
    "javascript": """\
a = 1
b()
;[1].map(f)
class A {
  x = 1
  m() {
    return 2;
  }
}
switch (a) {
  case 1:
    b();
    break;
  default:
    c();
}
export default function () {
  d();
}
""",
    "typescript": """\
interface I {
  a: string;
  b(): void;
}
class B {
  @dec()
  m(): number {
    return 1;
  }
  n = 2;
}
const f = (x: number) => {
  g(x);
  h();
};
""",
    "tsx": """\
function P() {
  const a = 1;
  b();
  return <b>{a}</b>;
}
export const Q = () => {
  const c: number = 1;
  d();
  return <P />;
};
""",
    "java": """\
package p;
import q.R;
class A {
  int x;
  A() {
    x = 1;
  }
  int f(int y) {
    switch (y) {
      case 1:
        g();
        break;
      default: h();
    }
    return y;
  }
}
""",
    "go": """\
package p

import (
\t"os"
)

type t []int

func f(x int) int {
\tswitch x {
\tcase 1:
\t\tg()
\t\th()
\tdefault:
\t\tk()
\t}
\treturn x
}

type u int
""",
    "rust": """\
/// Doubles.
#[inline]
fn f(x: i32) -> i32 {
    let y = x;
    match y {
        1 => {
            g();
        }
        _ => h(),
    }
    y * 2
}
impl A {
    fn k(&self) {
        l();
    }
}
""",
    "c": """\
#ifdef A
int x;
#else
int y;
#endif
#define Q 1
struct s {
  int a;
  int b;
};
int f(void) {
  if (x) {
    g();
  } else {
    h();
  }
  return 1;
}
""",
    "cpp": """\
class A {
 public:
  int f() {
    g();
    return 1;
  }
 private:
  int x;
};
template <typename T>
std::vector<T> B<T>::h() {
  {
    // why
    i();
  }
  j();
}
int z;
""",
}
