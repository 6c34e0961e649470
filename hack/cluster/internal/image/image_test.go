package image

import (
	"archive/tar"
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"io"
	"os"
	"path/filepath"
	"testing"

	"github.com/google/go-cmp/cmp"
)

func TestReference(t *testing.T) {
	for in, want := range map[string]string{
		"fairlead/cni:dev":                "docker.io/fairlead/cni:dev",
		"busybox":                         "docker.io/library/busybox:latest",
		"busybox:1":                       "docker.io/library/busybox:1",
		"registry.k8s.io/pause:3.10":      "registry.k8s.io/pause:3.10",
		"localhost/a":                     "localhost/a:latest",
		"host:5000/a/b":                   "host:5000/a/b:latest",
		"docker.io/fairlead/ztunnel:dev2": "docker.io/fairlead/ztunnel:dev2",
	} {
		if got := Reference(in); got != want {
			t.Errorf("%s: got %s, want %s", in, got, want)
		}
	}
}

func readTar(t *testing.T, b []byte) (map[string][]byte, map[string]tar.Header) {
	t.Helper()
	blobs, headers := map[string][]byte{}, map[string]tar.Header{}
	r := tar.NewReader(bytes.NewReader(b))
	for {
		h, err := r.Next()
		if errors.Is(err, io.EOF) {
			return blobs, headers
		}
		if err != nil {
			t.Fatal(err)
		}
		c, err := io.ReadAll(r)
		if err != nil {
			t.Fatal(err)
		}
		blobs[h.Name], headers[h.Name] = c, *h
	}
}

func TestWrite(t *testing.T) {
	src := filepath.Join(t.TempDir(), "prog")
	if err := os.WriteFile(src, []byte("#!"), 0o755); err != nil {
		t.Fatal(err)
	}
	img := Image{Names: []string{"fairlead/a:dev", "registry.example/b:1"}, Files: map[string]string{"/usr/bin/prog": src},
		Links: map[string]string{"/bin/sh": "/usr/bin/prog"}, Dirs: []string{"/tmp"}, Env: []string{"A=b"},
		Entrypoint: []string{"/usr/bin/prog"}, User: "1:1", Arch: "amd64"}
	var out, again bytes.Buffer
	if err := img.Write(&out); err != nil {
		t.Fatal(err)
	}
	if err := img.Write(&again); err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(out.Bytes(), again.Bytes()) {
		t.Error("two writes of the same image differ")
	}
	blobs, _ := readTar(t, out.Bytes())
	for name, b := range blobs {
		if digest, ok := bytes.CutPrefix([]byte(name), []byte("blobs/sha256/")); ok {
			if sum := sha256.Sum256(b); hex.EncodeToString(sum[:]) != string(digest) {
				t.Errorf("%s: content has another digest", name)
			}
		}
	}
	blob := func(d descriptor) []byte {
		b := blobs["blobs/sha256/"+d.Digest[len("sha256:"):]]
		if len(b) != d.Size {
			t.Errorf("%s: %d bytes, descriptor says %d", d.MediaType, len(b), d.Size)
		}
		return b
	}
	var idx index
	var m manifest
	var c config
	unmarshal(t, blobs["index.json"], &idx)
	var names []string
	for _, d := range idx.Manifests {
		names = append(names, d.Annotations["io.containerd.image.name"])
	}
	if d := cmp.Diff([]string{"docker.io/fairlead/a:dev", "registry.example/b:1"}, names); d != "" {
		t.Error(d)
	}
	unmarshal(t, blob(idx.Manifests[0]), &m)
	unmarshal(t, blob(m.Config), &c)
	if d := cmp.Diff([]string{searchPath, "A=b"}, c.Config.Env); d != "" || c.Config.User != "1:1" || c.RootFS.DiffIDs[0] != m.Layers[0].Digest {
		t.Errorf("configuration %+v %s", c, d)
	}
	files, headers := readTar(t, blob(m.Layers[0]))
	if string(files["usr/bin/prog"]) != "#!" || headers["usr/bin/prog"].Mode != 0o755 || headers["tmp/"].Mode != 0o1777 ||
		headers["bin/sh"].Linkname != "/usr/bin/prog" || headers["usr/"].Typeflag != tar.TypeDir {
		t.Errorf("layer: %v", headers)
	}
}

func unmarshal(t *testing.T, b []byte, v any) {
	t.Helper()
	if err := json.Unmarshal(b, v); err != nil {
		t.Fatalf("%v in %q", err, b)
	}
}

func TestWriteRefuses(t *testing.T) {
	if err := (Image{}).Write(io.Discard); err == nil {
		t.Error("an image without a name was written")
	}
	if err := (Image{Names: []string{"a"}, Files: map[string]string{"/x": "/does/not/exist"}}).Write(io.Discard); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("missing file: %v", err)
	}
}
