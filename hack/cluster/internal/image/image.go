// Package image (protocols) writes OCI image layouts as tar files, so that an
// image needs neither a container engine nor a registry
// (https://github.com/opencontainers/image-spec/blob/main/image-layout.md).
package image

import (
	"archive/tar"
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path"
	"path/filepath"
	"sort"
	"strings"
	"time"
)

// Image is what goes into an image: one layer of files, and its configuration.
type Image struct {
	Names      []string          // references; short ones are completed as a runtime completes them
	Files      map[string]string // path in the image → file on disk
	Links      map[string]string // path in the image → symbolic link's target
	Dirs       []string          // further directories; /tmp is made sticky and writable
	Env        []string          // K=V
	Entrypoint []string
	User       string
	Arch       string // GOARCH
}

// Reference completes a short image name: "a/b:c" is "docker.io/a/b:c" and
// "a" is "docker.io/library/a:latest".
func Reference(name string) string {
	first, _, multi := strings.Cut(name, "/")
	switch {
	case !multi:
		name = "docker.io/library/" + name
	case !strings.ContainsAny(first, ".:") && first != "localhost":
		name = "docker.io/" + name
	}
	if !strings.Contains(path.Base(name), ":") && !strings.Contains(name, "@") {
		name += ":latest"
	}
	return name
}

type descriptor struct {
	MediaType   string            `json:"mediaType"`
	Digest      string            `json:"digest"`
	Size        int               `json:"size"`
	Annotations map[string]string `json:"annotations,omitempty"`
	Platform    *platform         `json:"platform,omitempty"`
}

type platform struct {
	OS   string `json:"os"`
	Arch string `json:"architecture"`
}

type manifest struct {
	SchemaVersion int          `json:"schemaVersion"`
	MediaType     string       `json:"mediaType"`
	Config        descriptor   `json:"config"`
	Layers        []descriptor `json:"layers"`
}

type index struct {
	SchemaVersion int          `json:"schemaVersion"`
	MediaType     string       `json:"mediaType"`
	Manifests     []descriptor `json:"manifests"`
}

type config struct {
	Created time.Time `json:"created"`
	Arch    string    `json:"architecture"`
	OS      string    `json:"os"`
	Config  struct {
		User       string   `json:"User,omitempty"`
		Env        []string `json:"Env,omitempty"`
		Entrypoint []string `json:"Entrypoint,omitempty"`
	} `json:"config"`
	RootFS struct {
		Type    string   `json:"type"`
		DiffIDs []string `json:"diff_ids"`
	} `json:"rootfs"`
}

const searchPath = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

// Write writes img as an OCI layout tar. The same input gives the same bytes.
func (img Image) Write(w io.Writer) error {
	if len(img.Names) == 0 {
		return errors.New("an image needs a name")
	}
	layer, err := img.layer()
	if err != nil {
		return err
	}
	blobs := map[string][]byte{}
	put := func(mediaType string, b []byte) descriptor {
		sum := sha256.Sum256(b)
		digest := hex.EncodeToString(sum[:])
		blobs["blobs/sha256/"+digest] = b
		return descriptor{MediaType: mediaType, Digest: "sha256:" + digest, Size: len(b)}
	}
	layerDesc := put("application/vnd.oci.image.layer.v1.tar", layer)
	c := config{Created: time.Unix(0, 0).UTC(), Arch: img.Arch, OS: "linux"}
	c.Config.User, c.Config.Entrypoint = img.User, img.Entrypoint
	c.Config.Env = append([]string{searchPath}, img.Env...)
	c.RootFS.Type, c.RootFS.DiffIDs = "layers", []string{layerDesc.Digest}
	configJSON, err := json.Marshal(c)
	if err != nil {
		return err
	}
	m := manifest{SchemaVersion: 2, MediaType: "application/vnd.oci.image.manifest.v1+json",
		Config: put("application/vnd.oci.image.config.v1+json", configJSON), Layers: []descriptor{layerDesc}}
	manifestJSON, err := json.Marshal(m)
	if err != nil {
		return err
	}
	base := put(m.MediaType, manifestJSON)
	base.Platform = &platform{OS: "linux", Arch: img.Arch}
	idx := index{SchemaVersion: 2, MediaType: "application/vnd.oci.image.index.v1+json"}
	for _, name := range img.Names {
		d := base
		ref := Reference(name)
		d.Annotations = map[string]string{"io.containerd.image.name": ref, "org.opencontainers.image.ref.name": ref}
		idx.Manifests = append(idx.Manifests, d)
	}
	indexJSON, err := json.Marshal(idx)
	if err != nil {
		return err
	}
	blobs["oci-layout"] = []byte(`{"imageLayoutVersion":"1.0.0"}`)
	blobs["index.json"] = indexJSON
	return writeLayout(w, blobs)
}

func writeLayout(w io.Writer, blobs map[string][]byte) error {
	tw := tar.NewWriter(w)
	for _, name := range sortedKeys(blobs) {
		h := &tar.Header{Name: name, Typeflag: tar.TypeReg, Mode: 0o644, Size: int64(len(blobs[name]))}
		if err := tw.WriteHeader(h); err != nil {
			return err
		}
		if _, err := tw.Write(blobs[name]); err != nil {
			return err
		}
	}
	return tw.Close()
}

// layer builds the one layer, held in memory: the digest must precede it in the
// layout, and a few tens of megabytes do not pay for a temporary file.
func (img Image) layer() ([]byte, error) {
	var buf bytes.Buffer
	tw := tar.NewWriter(&buf)
	made := map[string]bool{"": true, ".": true}
	for _, d := range img.Dirs {
		if err := mkdirs(tw, made, inside(d)); err != nil {
			return nil, err
		}
	}
	for _, dst := range sortedKeys(img.Files) {
		if err := mkdirs(tw, made, path.Dir(inside(dst))); err != nil {
			return nil, err
		}
		if err := addFile(tw, inside(dst), img.Files[dst]); err != nil {
			return nil, fmt.Errorf("adding %s: %w", dst, err)
		}
	}
	for _, dst := range sortedKeys(img.Links) {
		if err := mkdirs(tw, made, path.Dir(inside(dst))); err != nil {
			return nil, err
		}
		h := &tar.Header{Name: inside(dst), Typeflag: tar.TypeSymlink, Linkname: img.Links[dst], Mode: 0o777}
		if err := tw.WriteHeader(h); err != nil {
			return nil, err
		}
	}
	if err := tw.Close(); err != nil {
		return nil, err
	}
	return buf.Bytes(), nil
}

// inside turns a path of the image into the relative form of tar entries.
func inside(p string) string { return strings.TrimPrefix(path.Clean("/"+p), "/") }

func mkdirs(tw *tar.Writer, made map[string]bool, dir string) error {
	if made[dir] {
		return nil
	}
	if err := mkdirs(tw, made, path.Dir(dir)); err != nil {
		return err
	}
	made[dir] = true
	mode := int64(0o755)
	if dir == "tmp" {
		mode = 0o1777
	}
	return tw.WriteHeader(&tar.Header{Name: dir + "/", Typeflag: tar.TypeDir, Mode: mode})
}

func addFile(tw *tar.Writer, dst, src string) error {
	f, err := os.Open(filepath.Clean(src))
	if err != nil {
		return err
	}
	defer f.Close()
	st, err := f.Stat()
	if err != nil {
		return err
	}
	h := &tar.Header{Name: dst, Typeflag: tar.TypeReg, Mode: int64(st.Mode().Perm()), Size: st.Size()}
	if err := tw.WriteHeader(h); err != nil {
		return err
	}
	_, err = io.Copy(tw, f)
	return err
}

func sortedKeys[V any](m map[string]V) []string {
	keys := make([]string, 0, len(m))
	for k := range m {
		keys = append(keys, k)
	}
	sort.Strings(keys)
	return keys
}
