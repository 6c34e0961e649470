package cgroup

import (
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

const hybrid = `25 20 0:22 / /sys/fs/cgroup rw,relatime - tmpfs tmpfs rw,mode=755
26 25 0:23 / /sys/fs/cgroup/systemd rw shared:9 - cgroup cgroup rw,xattr,release_agent=/lib/x,name=systemd
27 25 0:24 / /sys/fs/cgroup/cpu,cpuacct rw shared:10 - cgroup cgroup rw,cpu,cpuacct
28 25 0:24 / /mnt/again rw - cgroup cgroup rw,cpu,cpuacct
29 25 0:25 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw,nsdelegate
`

func TestParse(t *testing.T) {
	for _, c := range []struct {
		name, mounts string
		want         Hierarchies
		v1           bool
	}{
		{name: "hybrid", mounts: hybrid, v1: true, want: Hierarchies{
			{Mount: "/sys/fs/cgroup/systemd", Options: "none,name=systemd"},
			{Mount: "/sys/fs/cgroup/cpu,cpuacct", Options: "cpu,cpuacct"},
			{Mount: "/sys/fs/cgroup/unified", V2: true},
		}},
		{name: "v2 only", mounts: "30 20 0:26 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw,nsdelegate\n",
			want: Hierarchies{{Mount: "/sys/fs/cgroup", V2: true}}},
		{name: "none", mounts: "25 20 0:22 / / rw - ext4 /dev/vda rw\nbroken line\n"},
	} {
		t.Run(c.name, func(t *testing.T) {
			got, err := parse(strings.NewReader(c.mounts))
			if err != nil {
				t.Fatal(err)
			}
			if d := cmp.Diff(c.want, got); d != "" {
				t.Error(d)
			}
			if got.V1() != c.v1 {
				t.Errorf("V1() = %v", got.V1())
			}
		})
	}
}
