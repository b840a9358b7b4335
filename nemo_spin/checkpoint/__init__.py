"""What a run resumes from: when to save, the files, their checksums, and finding the newest whole one."""
